# mypy: disable-error-code="no-untyped-def"
"""A candidate, to be decided by measurement: e in [0, 1] kept in 12 bits, a byte plane and a plane of half bytes.

An fp16 in [0, 1] has 0 in its sign and in the first bit of its exponent; with two bits of the mantissa rounded away, 4
bits of exponent and 8 of mantissa are left: a relative error of 2^-9, which is what rounding dz to bf16 costs anyway.
"""

import triton
import triton.language as tl

from asyncopd.kernels.numeric import INF, to_storage


@triton.jit
def store_packed(e, high, low, column, half, there, half_there, TILE: tl.constexpr):
    """e fp32 [TILE] -> a byte at high + column, and at low + half one byte of two columns."""
    bits = e.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    rounded = tl.minimum((bits + 2) >> 2, 4095)  # 1 is 3840, so a NaN stays above all that is a number
    tl.store(high + column, (rounded >> 4).to(tl.uint8), mask=there)
    even, odd = tl.split(tl.reshape(rounded & 15, (TILE // 2, 2)))
    tl.store(low + half, (even | (odd << 4)).to(tl.uint8), mask=half_there)


@triton.jit
def load_packed(high, low, column, half, there, half_there, TILE: tl.constexpr):  # -> fp32 [TILE]
    byte = tl.load(high + column, mask=there, other=0).to(tl.int32)
    pair = tl.load(low + half, mask=half_there, other=0).to(tl.int32)
    rest = tl.reshape(tl.join(pair & 15, pair >> 4), (TILE,))
    return (((byte << 4) | rest) << 2).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pack_kernel(
    x,  # [N, stride] fp32 products
    high,  # [N, columns] uint8
    low,  # [N, columns / 2] uint8
    peaks,  # [N, tiles] fp32
    sums,  # [N, tiles] fp32
    stride,
    columns,  # a multiple of 2
    scale,
    TILE: tl.constexpr,
):
    """e = exp of a product less the largest of its tile, packed; the tile's largest and sum."""
    row, tile = tl.program_id(0), tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    half = tile * (TILE // 2) + tl.arange(0, TILE // 2)
    there, half_there = column < columns, half < columns // 2
    z = tl.load(x + row.to(tl.int64) * stride + column, mask=there, other=-INF)
    peak = tl.max(z, axis=0)
    e = tl.exp2((z - peak) * scale)
    at = row * tl.num_programs(1) + tile
    tl.store(peaks + at, peak)
    tl.store(sums + at, tl.sum(e, axis=0))
    high_row, low_row = high + row.to(tl.int64) * columns, low + row.to(tl.int64) * (columns // 2)
    store_packed(e, high_row, low_row, column, half, there, half_there, TILE)


@triton.jit
def unpack_kernel(
    high,  # [N, columns] uint8
    low,  # [N, columns / 2] uint8
    shares,  # [N, tiles] fp32: what a tile's e are multiplied by
    dx,  # [N, columns], 16 bits
    columns,
    TILE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row, tile = tl.program_id(0), tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    half = tile * (TILE // 2) + tl.arange(0, TILE // 2)
    there, half_there = column < columns, half < columns // 2
    high_row, low_row = high + row.to(tl.int64) * columns, low + row.to(tl.int64) * (columns // 2)
    e = load_packed(high_row, low_row, column, half, there, half_there, TILE)
    share = tl.load(shares + row * tl.num_programs(1) + tile)
    value = to_storage(e * share, dx.dtype.element_ty, INTERPRET)
    tl.store(dx + row.to(tl.int64) * columns + column, value, mask=there)
