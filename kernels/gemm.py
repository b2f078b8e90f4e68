"""Matrix products that sum in fp32, and whose number of rows, or of terms, may be known to the device alone.

    out[M, N] (=|+=) a[M, K] b[K, N]            2 M N K FLOPs; (M K + K N) itemsize and M N out bytes at least

Without a count it is cuBLAS, wherever that sums in fp32: no TF32 or fp16 sums switched on in torch, and for a 16-bit
`out` with that asked for (cublas.py). Otherwise it is the kernel here, which reads the count itself: programs past the
last row end at once, so rows that are not there cost nothing and nobody waits for the device to say how many there are.

Limit: the tensor cores (16-bit operands; fp32 ones are multiplied in fp32, outside of them), or the L2. A tile of
BM x BN is BM BN / (BM + BN) FLOPs per byte of 16-bit operands, 85 for 128 x 256, so 989 TFLOPS (H100) would take
11.6 TB/s from the L2, about twice what it delivers: blocks that share what they load (clusters) are what cuBLAS has and
plain loads have not, and why it is taken where it can be. Consecutive programs are GROUP_ROWS tiles of rows by some
columns, so that what comes from memory is read about once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.cublas import mm_rounded_once, rounds_once
from asyncopd.kernels.launch import DEVICE_TYPE, DTYPES, INTERPRET, cdiv, launch
from asyncopd.kernels.numeric import to_storage
from asyncopd.kernels.tuning import choose

GROUP_ROWS = 8  # tiles: 1,024 rows of a, 8 MiB at K = 4,096, stay in the L2 while b streams by
ALL, ROWS, DEPTH = 0, 1, 2  # what a count counts


class Tile(NamedTuple):
    """A program's part of `out`, BM x BN, and the terms of the sum that it takes at a time."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


# By compute capability. Large: 128 sums a thread, so one block of 8 warps an SM, and as many stages in flight as leave
# sm_90 and sm_100 192 of their 227 KiB; BK = 64 is a swizzled line of 128 bytes. On sm_80, whose operands pass through
# registers, 64 terms at a time would spill.
LARGE = {
    8: Tile(128, 256, 32, 8, 4),
    9: Tile(128, 256, 64, 8, 4),
    10: Tile(128, 256, 64, 8, 4),
}
# Where large tiles would leave SMs without one. wgmma (sm_90) takes 64 rows at least, tcgen05 (sm_100) 128.
SMALL = {
    8: Tile(64, 128, 64, 4, 4),
    9: Tile(64, 128, 64, 4, 4),
    10: Tile(128, 64, 64, 4, 4),
}
# fp32 without tensor cores: 32 sums a thread.
FP32 = Tile(64, 128, 32, 8, 3)


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUP_ROWS: tl.constexpr):
    """Which tile a program makes: GROUP_ROWS of them from top to bottom, then the columns to the right."""
    group = program // (GROUP_ROWS * column_tiles)
    inside = program % (GROUP_ROWS * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP_ROWS, GROUP_ROWS)
    return group * GROUP_ROWS + inside % height, inside // height


@triton.jit
def tile_product(
    a,  # [.., K]: where row 0 begins
    b,  # [K, ..]: where column 0 begins
    row,  # [BM] int: of a
    row_there,  # [BM] bool: a row that is not there is not read, and is zero
    column,  # [BN] int: of b
    column_there,  # [BN] bool
    depth,  # K
    a_row_stride,
    a_stride,  # along K
    b_stride,  # along K
    b_column_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,  # BK divides K
    INTERPRET: tl.constexpr,
):
    """fp32 [BM, BN]. Each sum is over k from 0 to K in the same steps, whatever BM and BN and whoever calls."""
    k = tl.arange(0, BK).to(tl.int64)
    a_at = a + row.to(tl.int64)[:, None] * a_row_stride + k[None, :] * a_stride
    b_at = b + k[:, None] * b_stride + column.to(tl.int64)[None, :] * b_column_stride
    a_step = tl.full((), BK, tl.int64) * a_stride
    b_step = tl.full((), BK, tl.int64) * b_stride
    total = tl.zeros([BM, BN], tl.float32)
    for _ in range(depth // BK):
        x = tl.load(a_at, mask=row_there[:, None], other=0.0)
        y = tl.load(b_at, mask=column_there[None, :], other=0.0)
        if INTERPRET:
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision="ieee")
        a_at += a_step
        b_at += b_step
    if not WHOLE:
        # Outside of the loop: a bound on k inside would cost every load its width. As few terms at a time as a product
        # may have: without width, each takes a register for its address.
        for begin in tl.range(depth // BK * BK, depth, 16, num_stages=1):
            last = begin + tl.arange(0, 16).to(tl.int64)
            last_a = a + row.to(tl.int64)[:, None] * a_row_stride + last[None, :] * a_stride
            last_b = b + last[:, None] * b_stride + column.to(tl.int64)[None, :] * b_column_stride
            x = tl.load(last_a, mask=row_there[:, None] & (last < depth)[None, :], other=0.0)
            y = tl.load(last_b, mask=column_there[None, :] & (last < depth)[:, None], other=0.0)
            if INTERPRET:
                x, y = x.to(tl.float32), y.to(tl.float32)
            total = tl.dot(x, y, total, input_precision="ieee")
    return total


@triton.jit
def _store(
    value,  # fp32 [BM, columns of the tile]
    row_out,  # [BM, 1]: where each row of out begins
    row_there,
    column,
    columns,
    ACCUMULATE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    at = row_out + column[None, :]
    there = row_there[:, None] & (column < columns)[None, :]
    if ACCUMULATE:
        value += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, to_storage(value, row_out.dtype.element_ty, INTERPRET), mask=there)


@triton.jit
def _product_kernel(
    a,  # [M, K]
    b,  # [K, N], the dtype of a
    out,  # [M, N], unit column stride
    count,  # [] int32 or int64, or None
    rows,  # M
    columns,  # N
    depth,  # K
    a_row_stride,
    a_stride,  # along K
    b_stride,  # along K
    b_column_stride,
    out_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    COUNTED: tl.constexpr,
    WHOLE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    if COUNTED == 1:
        rows = tl.minimum(tl.load(count), rows).to(tl.int32)
    if COUNTED == 2:
        depth = tl.maximum(tl.minimum(tl.load(count), depth), 0).to(tl.int32)
    row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    program = tl.program_id(0)
    # The tiles that there are come first, so none of those that run waits for one that has nothing to do.
    if program >= row_tiles * column_tiles:
        return
    row_tile, column_tile = tile_of(program, row_tiles, column_tiles, GROUP_ROWS)
    row = row_tile * BM + tl.arange(0, BM)
    column = column_tile * BN + tl.arange(0, BN)
    value = tile_product(
        a,
        b,
        row,
        row < rows,
        column,
        column < columns,
        depth,
        a_row_stride,
        a_stride,
        b_stride,
        b_column_stride,
        BM,
        BN,
        BK,
        WHOLE,
        INTERPRET,
    )
    row_out = out + row.to(tl.int64)[:, None] * out_stride
    if BN == 256:
        # A half at a time: beside all 128 sums of a thread there are no registers to store them from.
        left, right = tl.split(tl.permute(tl.reshape(value, (BM, 2, BN // 2)), (0, 2, 1)))
        half = column_tile * BN + tl.arange(0, BN // 2)
        _store(left, row_out, row < rows, half, columns, ACCUMULATE, INTERPRET)
        _store(right, row_out, row < rows, half + BN // 2, columns, ACCUMULATE, INTERPRET)
    else:
        _store(value, row_out, row < rows, column, columns, ACCUMULATE, INTERPRET)


def tile_for(a: Tensor, rows: int, columns: int) -> Tile:
    """The large tile where it keeps every SM busy."""
    return tiles_for(a, rows, columns)[0]


def tiles_for(a: Tensor, rows: int, columns: int) -> tuple[Tile, ...]:
    """All that are compiled ahead of time for a's device and dtype; the one to take by the model first."""
    if a.dtype == torch.float32:
        return (FP32,)
    if a.device.type != "cuda":
        return LARGE[9], SMALL[9]
    capability = torch.cuda.get_device_capability(a.device)[0]
    # Others have no more shared memory than sm_80, and its instructions.
    large, small = LARGE.get(capability, LARGE[8]), SMALL.get(capability, SMALL[8])
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count
    busy = cdiv(rows, large.BM) * cdiv(columns, large.BN) >= processors
    return (large, small) if busy else (small, large)


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    count: Tensor | None = None,
    counted: str = "rows",
    accumulate: bool = False,
) -> None:
    """out[M, N] = a[M, K] @ b[K, N], or += with `accumulate`; sums in fp32, rounded once to out's dtype.

    Args:
        a, b: of one dtype, bf16, fp16 or fp32; views, transposed or not, with a unit stride each.
        out: fp32 or the operands' dtype, unit column stride; shares no memory with a and b.
        count: int32 or int64, 0-dim, on the same device. counted="rows": a and out have only that many rows, the
            others are neither read nor written. counted="depth": only the first `count` terms of each sum count; the
            others, NaN or not, are not read. Below 0 it is 0, beyond M or K it is M or K.
    """
    _check(a, b, out, count, counted)
    rows, columns = out.shape
    if rows == 0 or columns == 0:
        return
    if count is None and a.device.type == "cpu":
        value = a.float() @ b.float()
        out.copy_(out.float() + value if accumulate else value)
    elif count is None and cublas_sums_in_fp32(a, out):
        # Into `out` itself, so that nothing else is [M, N].
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif count is None and not accumulate and rounds_once(out):
        mm_rounded_once(a, b, out)
    else:
        _launch(a, b, out, count, ALL if count is None else ROWS if counted == "rows" else DEPTH, accumulate)


def cublas_sums_in_fp32(a: Tensor, out: Tensor) -> bool:
    """Whether torch's settings let it. A 16-bit `out` may be summed in parts that are rounded to 16 bits."""
    matmul = torch.backends.cuda.matmul
    if a.dtype == torch.float32:
        return bool(matmul.fp32_precision != "tf32")
    return out.dtype == torch.float32 and not (a.dtype == torch.float16 and matmul.allow_fp16_accumulation)


def _launch(a: Tensor, b: Tensor, out: Tensor, count: Tensor | None, counted: int, accumulate: bool) -> None:
    (rows, depth), columns = a.shape, b.shape[1]

    def run(tile: Tile, out: Tensor) -> None:
        programs = cdiv(rows, tile.BM) * cdiv(columns, tile.BN)
        launch(
            _product_kernel,
            programs,
            a,
            b,
            out,
            count,
            rows,
            columns,
            depth,
            *a.stride(),
            *b.stride(),
            out.stride(0),
            tile.BM,
            tile.BN,
            tile.BK,
            GROUP_ROWS,
            counted,
            depth % tile.BK == 0 and counted != DEPTH,
            accumulate,
            INTERPRET,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    layout = f"{'nt'[a.stride(0) == 1]}{'nt'[b.stride(0) == 1]} {a.dtype} to {out.dtype}"
    shape = {"rows": rows, "columns": columns, "depth": depth, "layout": layout, "counted": counted}
    candidates = tiles_for(a, rows, columns)
    run(choose("gemm", shape, candidates, lambda tile: run(tile, torch.empty_like(out))), out)


def _check(a: Tensor, b: Tensor, out: Tensor, count: Tensor | None, counted: str) -> None:
    for name, operand in (("a", a), ("b", b)):
        if operand.dtype not in DTYPES:
            raise TypeError(f"{name}: got {operand.dtype}, expected float32, bfloat16 or float16")
        if operand.dim() != 2:
            raise ValueError(f"{name}: got shape {list(operand.shape)}, expected two dimensions")
        if 1 not in operand.stride() and 1 not in operand.shape and operand.numel():
            raise ValueError(f"{name}: got strides {list(operand.stride())}, expected one of them to be 1")
    if b.dtype != a.dtype or b.shape[0] != a.shape[1]:
        raise ValueError(f"b: got {b.dtype} {list(b.shape)}, expected {a.dtype} [{a.shape[1]}, N] to follow a")
    if out.shape != (a.shape[0], b.shape[1]) or out.dtype not in (torch.float32, a.dtype):
        expected = f"{torch.float32} or {a.dtype} [{a.shape[0]}, {b.shape[1]}]"
        raise ValueError(f"out: got {out.dtype} {list(out.shape)}, expected {expected}")
    if out.stride(1) != 1 and out.shape[1] > 1:
        raise ValueError(f"out: got column stride {out.stride(1)}, expected 1")
    for name, tensor in (("a", a), ("b", b), ("out", out), ("count", count)):
        if tensor is not None and (tensor.device != a.device or tensor.device.type != DEVICE_TYPE):
            raise ValueError(f"{name}: got device {tensor.device}, expected {DEVICE_TYPE}, the same for all")
    if counted not in ("rows", "depth"):
        raise ValueError(f"counted: got {counted!r}, expected 'rows' or 'depth'")
    if count is not None and (count.dim() != 0 or count.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"count: got {count.dtype} {list(count.shape)}, expected a 0-dim int32 or int64 tensor")


def _case(
    name: str,
    archs: tuple[int, ...],
    dtype: str,
    tile: Tile,
    unit: tuple[str, str],
    counted: int,
    whole: bool,
    out: str,
) -> CompileCase:
    strides = ("a_row_stride", "a_stride", "b_stride", "b_column_stride")
    constexprs = {
        **dict.fromkeys(unit, 1),
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
        "GROUP_ROWS": GROUP_ROWS,
        "COUNTED": counted,
        "WHOLE": whole,
        "ACCUMULATE": counted == DEPTH,
        "INTERPRET": False,
    }
    return CompileCase(
        name=name,
        kernel=_product_kernel,
        signature={
            "a": f"*{dtype}",
            "b": f"*{dtype}",
            "out": f"*{out}",
            "count": "*i64",
            **dict.fromkeys(("rows", "columns", "depth", *strides, "out_stride"), "i32"),
            **dict.fromkeys(constexprs, "constexpr"),
        },
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        # 256 threads: one block of 8 warps an SM, or two of 4.
        max_registers=255,
        divisible=("a", "b", "out", "rows", "columns", "depth", *(s for s in strides if s not in unit), "out_stride"),
        archs=archs,
    )


def compile_cases() -> list[CompileCase]:
    """The three products of a head: z = h W^T and dh = dz W by rows, dW += dz^T h by depth."""
    tiles: list[tuple[str, str, tuple[int, ...], Tile]] = [("fp32", "", (80, 90, 100), FP32)]
    for capability, large in LARGE.items():
        arch = 10 * capability
        tiles += [("bf16", f"-{arch}", (arch,), large), ("fp16", f"-{arch}", (arch,), large)]
        tiles.append(("bf16", f"-small-{arch}", (arch,), SMALL[capability]))
    cases = []
    for dtype, suffix, archs, tile in tiles:
        unit = ("a_stride", "b_stride")
        cases.append(_case(f"gemm-logits-{dtype}{suffix}", archs, dtype, tile, unit, ROWS, True, "fp32"))
        if dtype != "fp16":  # as bf16
            cases.append(_case(f"gemm-ragged-{dtype}{suffix}", archs, dtype, tile, unit, ROWS, False, "fp32"))
            unit = ("a_stride", "b_column_stride")
            cases.append(_case(f"gemm-dhidden-{dtype}{suffix}", archs, dtype, tile, unit, ROWS, True, dtype))
            unit = ("a_row_stride", "b_column_stride")
            cases.append(_case(f"gemm-dweight-{dtype}{suffix}", archs, dtype, tile, unit, DEPTH, False, "fp32"))
    return cases
