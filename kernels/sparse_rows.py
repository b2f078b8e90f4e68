"""The sampled head, a row at a time: K dot products with rows of the weight (an SDDMM) and dH (an SpMM).

    y[n, k] = h[n] . W[ids[n, k]]           dh[n] = sum_k dy[n, k] W[ids[n, k]]

Each asks for K rows of W a row of h. With b bytes an element:

    row by row      N K H b of W from L2, once more N H b of h
    id by id        N K H b of h from L2, once U H b of W; U: distinct ids, at most min(V, N K)

At N = 8,192, K = 64, H = 4,096 in bf16 that is 4.3 GB from L2 either way, 0.8 ms at 5.5 TB/s; what differs is what
comes from memory. Id by id it is U H b, and a sort of N K ids; and dH would need a sum over programs. Row by row it is
U H b too, as long as W's rows stay in L2 between the rows of h that name them. So columns are the slowest index of the
grid, and a slice of them is as wide as lets that slice of all of W stay in half of the L2, whose two halves each keep
what their own SMs read: 64 columns of 151,936 rows are 19 MB of 50 (H100), 256 would be 78. That this is faster than
256 is a prediction; bench/gpu.sh measures it. A slice is no narrower than a program needs to have 4,096 elements of W,
so for few ids, which few rows of h share, it stays wide. Limit: U H b from memory (1.24 GB if every id of 151,936 is
named, 0.37 ms at 3.35 TB/s) beside 4.3 GB from L2. What slices cost: the forward's partial sums, slices N K fp32 (64
slices: 134 MB written and read), and ids and factors, read once a slice (6 to 9 % of the rows).

The arithmetic is 2 N K H FLOP (4.3 GFLOP), a fused multiply-add and a conversion an element: no tensor core has
anything to do with one row against rows of its own. 16 bytes a load in any dtype, 64 in flight a thread in bf16.

Accuracy: fp32 products of the given values. A dot product is 64 sums of at most 4 terms (K >= 64), folded as a tree,
and slices are added with their rounding errors; dh is 16 sums of K / 16 terms, or 64 of K / 64, then a tree. All in an
order that V, K, the dtype and the device decide, whatever the number of rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import INTERPRET, cdiv, launch, padded
from asyncopd.kernels.numeric import INF, sum_pair, to_storage
from asyncopd.kernels.softcap import Factors, logit_of
from asyncopd.kernels.sparse_entries import Entries
from asyncopd.kernels.summary import row_start

SLICES = (256, 128, 64)  # columns of a program
L2_BYTES = 50 << 20  # of an H100: where no device says it
TILE = 4096  # elements of the weight that a program of 4 warps loads at a time
FINISHED = 512  # logits of a program that adds up slices


@triton.jit
def rows_of_weight(weight, token, stride, column, width, inside):
    """fp32 [tokens, columns] of the weight; 0 where a token is not inside, or a column beyond the width."""
    at = token.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(weight + at, mask=inside[:, None] & (column < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _dots_kernel(
    hidden,  # [N, H], unit column stride
    weight,  # [V, H], unit column stride
    ids,  # [N, K] int32 or int64
    partials,  # [slices, N, K] fp32: the slice's dot products; not written where the id is none of the vocabulary
    hidden_stride,
    weight_stride,
    rows,
    vocab,
    width,
    k,
    blocks,  # of ids to a row
    SLICE: tl.constexpr,
    STEP: tl.constexpr,
    IDS: tl.constexpr,
):
    program = tl.program_id(0)
    part, row, block = program // (rows * blocks), program // blocks % rows, program % blocks
    at = block * IDS + tl.arange(0, IDS)
    token = tl.load(row_start(ids, row, k) + at, mask=at < k, other=-1)
    inside = (token >= 0) & (token < vocab)
    # Nothing of a masked row is read.
    if tl.max(inside.to(tl.int32), axis=0) > 0:
        base = row_start(hidden, row, hidden_stride)
        total = tl.zeros([IDS, STEP], tl.float32)
        for start in range(0, SLICE, STEP):
            column = part * SLICE + start + tl.arange(0, STEP)
            h = tl.load(base + column, mask=column < width, other=0.0).to(tl.float32)
            total += rows_of_weight(weight, token, weight_stride, column, width, inside) * h[None, :]
        out = row_start(partials, part.to(tl.int64) * rows + row, k)
        tl.store(out + at, tl.sum(total, axis=1), mask=inside)


@triton.jit
def _finish_kernel(
    partials,  # [slices, N K] fp32
    ids,  # [N K] int32 or int64
    bias,  # [V] fp32
    logits,  # [N K] fp32
    slices,
    count,  # N K
    vocab,
    inner,
    inner_low,
    outer,
    outer_low,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + at, mask=at < count, other=-1)
    inside = (token >= 0) & (token < vocab)
    total = tl.zeros([BLOCK], tl.float32)
    low = tl.zeros([BLOCK], tl.float32)
    for part in range(slices):
        dots = tl.load(row_start(partials, part + tl.zeros([BLOCK], tl.int32), count) + at, mask=inside, other=0.0)
        total, error = sum_pair(total, dots)
        low += error
    if HAS_BIAS:
        total, error = sum_pair(total, tl.load(bias + token, mask=inside, other=0.0))
        low += error
    # Infinities have no rounding errors.
    total = tl.where(tl.abs(total) < INF, total + low, total)
    z = logit_of(total, inner, inner_low, outer, outer_low, HAS_CAP)
    # A device cannot refuse an id; it is not read, and shows.
    z = tl.where(inside, z, tl.where(token == -1, -INF, float("nan")))
    tl.store(logits + at, z, mask=at < count)


@triton.jit
def _hidden_gradient_kernel(
    factors,  # [N, K] fp32: dy
    keys,  # [N, K] int32: ids, or `vocab` where an entry takes no part
    weight,  # [V, H], unit column stride
    base,  # [N, H] fp32, contiguous: what is added, times `shares`, or None
    shares,  # [N] fp32, or None; where one is 0, the row of `base` is not looked at
    dhidden,  # [N, H], contiguous
    weight_stride,
    rows,
    vocab,
    width,
    k,
    SLICE: tl.constexpr,
    IDS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    part, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    column = part * SLICE + tl.arange(0, SLICE)
    total = tl.zeros([IDS, SLICE], tl.float32)
    for start in range(0, k, IDS):
        at = start + tl.arange(0, IDS)
        token = tl.load(row_start(keys, row, k) + at, mask=at < k, other=vocab)
        inside = token < vocab
        factor = tl.load(row_start(factors, row, k) + at, mask=inside, other=0.0)
        total += factor[:, None] * rows_of_weight(weight, token, weight_stride, column, width, inside)
    value = tl.sum(total, axis=0)
    if HAS_BASE:
        share = tl.load(shares + row)
        if share != 0.0:
            value += share * tl.load(row_start(base, row, width) + column, mask=column < width, other=0.0)
    value = to_storage(value, dhidden.dtype.element_ty, INTERPRET)
    tl.store(row_start(dhidden, row, width) + column, value, mask=column < width)


def _l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else L2_BYTES


def slice_for(weight: Tensor, k: int) -> int:
    """Columns of a program: the most of which all of the weight's stay in half of the L2, or else the fewest."""
    half = _l2_bytes(weight.device) // 2
    enough_work = [size for size in SLICES if size * padded(k, 1) >= TILE or size == SLICES[0]]
    column = weight.shape[0] * weight.dtype.itemsize
    return next((size for size in enough_work if size * column <= half), enough_work[-1])


class Blocks(NamedTuple):
    """Sizes of a program: the columns of its slice; `ids` at a time, `step` columns of them."""

    slice: int
    ids: int
    step: int
    num_warps: int

    @classmethod
    def forward(cls, k: int, columns: int) -> "Blocks":
        ids = min(64, padded(k, 1))
        step = min(columns, TILE // ids)
        return cls(columns, ids, step, max(1, ids * step // 1024))

    @classmethod
    def backward(cls, k: int, columns: int) -> "Blocks":
        ids = min(TILE // columns, padded(k, 1))
        return cls(columns, ids, columns, max(1, ids * columns // 1024))


def launch_logits(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, factors: Factors, cap: bool
) -> Tensor:
    """hidden [N, H] and weight [V, H] with unit column strides, contiguous ids [N, K], fp32 bias -> fp32 [N, K]."""
    (rows, width), (vocab, _), k = hidden.shape, weight.shape, ids.shape[1]
    logits = torch.empty((rows, k), dtype=torch.float32, device=hidden.device)
    if logits.numel() == 0:
        return logits
    sizes = Blocks.forward(k, slice_for(weight, k))
    slices = cdiv(width, sizes.slice)
    partials = torch.empty((slices, rows, k), dtype=torch.float32, device=hidden.device)
    blocks = cdiv(k, sizes.ids)
    if slices:
        launch(
            _dots_kernel,
            slices * rows * blocks,
            hidden,
            weight,
            ids,
            partials,
            hidden.stride(0),
            weight.stride(0),
            rows,
            vocab,
            width,
            k,
            blocks,
            sizes.slice,
            sizes.step,
            sizes.ids,
            num_warps=sizes.num_warps,
        )
    launch(
        _finish_kernel,
        cdiv(rows * k, FINISHED),
        partials,
        ids,
        partials if bias is None else bias,
        logits,
        slices,
        rows * k,
        vocab,
        *factors[:4],
        FINISHED,
        bias is not None,
        cap,
        num_warps=4,
    )
    return logits


def launch_hidden_gradient(
    entries: Entries, weight: Tensor, dhidden: Tensor, base: tuple[Tensor, Tensor] | None = None
) -> None:
    """Every element of dhidden [N, H], contiguous, is written. base: [N, H] and [N] fp32, whose product is added."""
    (rows, width), k = dhidden.shape, entries.keys.shape[1]
    sizes = Blocks.backward(k, slice_for(weight, k))
    if dhidden.numel() == 0:
        return
    launch(
        _hidden_gradient_kernel,
        cdiv(width, sizes.slice) * rows,
        *entries,
        weight,
        *((None, None) if base is None else base),
        dhidden,
        weight.stride(0),
        rows,
        weight.shape[0],
        width,
        k,
        sizes.slice,
        sizes.ids,
        base is not None,
        INTERPRET,
        num_warps=sizes.num_warps,
    )


def compile_cases() -> list[CompileCase]:
    """H is no constant of any of them: the machine code for 1,024 and 4,096 is one."""
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        for k, columns in ((1, 256), (64, 256), (64, 128), (64, 64)):
            forward, backward = Blocks.forward(k, columns), Blocks.backward(k, columns)
            what = f"{dtype}-k{k}" + ("" if columns == 256 else f"-slice{columns}")
            dots = CompileCase(
                name=f"sparse-head-dots-{what}",
                kernel=_dots_kernel,
                signature={
                    **dict.fromkeys(("hidden", "weight"), f"*{dtype}"),
                    "ids": "*i64",
                    "partials": "*fp32",
                    **dict.fromkeys(("hidden_stride", "weight_stride", "rows", "vocab", "width", "k", "blocks"), "i32"),
                    **dict.fromkeys(("SLICE", "STEP", "IDS"), "constexpr"),
                },
                constexprs={"SLICE": columns, "STEP": forward.step, "IDS": forward.ids},
                num_warps=forward.num_warps,
                max_registers=96,
                divisible=(
                    *("hidden", "weight", "ids", "partials", "hidden_stride", "weight_stride", "width"),
                    *("rows", "vocab"),
                ),
            )
            cases.append(dots)
            for has_base in (False, True) if k > 1 else (False,):
                hidden_gradient = CompileCase(
                    name=f"sparse-head-hidden-gradient-{what}" + ("-base" if has_base else ""),
                    kernel=_hidden_gradient_kernel,
                    signature={
                        "factors": "*fp32",
                        "keys": "*i32",
                        "weight": f"*{dtype}",
                        **dict.fromkeys(("base", "shares"), "*fp32"),
                        "dhidden": f"*{dtype}",
                        **dict.fromkeys(("weight_stride", "rows", "vocab", "width", "k"), "i32"),
                        **dict.fromkeys(("SLICE", "IDS", "HAS_BASE", "INTERPRET"), "constexpr"),
                    },
                    constexprs={"SLICE": columns, "IDS": backward.ids, "HAS_BASE": has_base, "INTERPRET": False},
                    num_warps=backward.num_warps,
                    max_registers=80,
                    divisible=(
                        *("factors", "keys", "weight", "base", "shares", "dhidden"),
                        *("weight_stride", "rows", "vocab", "width"),
                    ),
                )
                cases.append(hidden_gradient)
    return [*cases, *(_finish_case(cap) for cap in (False, True))]


def _finish_case(cap: bool) -> CompileCase:
    return CompileCase(
        name="sparse-head-finish" + ("-softcap" if cap else ""),
        kernel=_finish_kernel,
        signature={
            "partials": "*fp32",
            "ids": "*i64",
            **dict.fromkeys(("bias", "logits"), "*fp32"),
            **dict.fromkeys(("slices", "count", "vocab"), "i32"),
            **dict.fromkeys(("inner", "inner_low", "outer", "outer_low"), "fp32"),
            **dict.fromkeys(("BLOCK", "HAS_BIAS", "HAS_CAP"), "constexpr"),
        },
        constexprs={"BLOCK": FINISHED, "HAS_BIAS": True, "HAS_CAP": cap},
        num_warps=4,
        max_registers=48,
        divisible=("partials", "ids", "bias", "logits", "slices", "count", "vocab"),
    )
