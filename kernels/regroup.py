"""Logits of some groups of each row, again: a GEMM whose rows are the (row, group) pairs that share a group.

Pairs are sorted by group, so one program has up to PAIRS rows of `hidden` that all want the same 64 rows of the head:
N = 8192, K = 64, V = 151,936 are 221 pairs a group. Fetched pair by pair, the head's rows alone would be 275 GB at
H = 4096 in bf16; so they are 2.5 GB, and the pairs' hidden states 4.3 GB, from an L2 that nearly holds both operands'
live parts: about 1.2 ms at 5.5 TB/s (H100), against 0.28 ms for its 2 N K 64 H FLOPs.

How many programs a group needs is known to the device alone. There are at most min(groups, pairs) + pairs / PAIRS of
them; what is not needed ends at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.epilogue import Epilogue, head_logit
from asyncopd.kernels.gemm import Tile, tile_product
from asyncopd.kernels.launch import INTERPRET, launch
from asyncopd.kernels.numeric import INF
from asyncopd.kernels.summary import GROUP, count_groups

# 128 pairs, as tcgen05 (sm_100) takes no fewer; two blocks of 4 warps an SM.
TILE = Tile(128, GROUP, 64, 4, 4)
FP32 = Tile(32, GROUP, 32, 4, 3)


@triton.jit
def _regroup_kernel(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] fp32, or None
    order,  # [N * CHOSEN] int64: pairs, sorted by group; pair = row * chosen + slot
    starts,  # [groups + 1] int64: where each group's pairs begin in `order`
    program_group,  # [programs] int64: `groups` where there is nothing to do
    first_program,  # [groups] int64
    logits,  # [N * chosen, GROUP] fp32
    chosen,
    columns,  # V
    depth,  # H
    groups,
    hidden_row_stride,
    hidden_stride,
    weight_row_stride,
    weight_stride,
    logit_scale,
    softcap,
    softcap_inverse,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    program = tl.program_id(0)
    group = tl.load(program_group + program).to(tl.int32)
    if group >= groups:
        return
    at = tl.load(starts + group) + (program - tl.load(first_program + group)) * PAIRS + tl.arange(0, PAIRS)
    there = at < tl.load(starts + group + 1)
    pair = tl.load(order + at, mask=there, other=0)
    column = group * GROUP + tl.arange(0, GROUP)
    z = tile_product(
        hidden,
        weight,
        pair // chosen,
        there,
        column,
        column < columns,
        depth,
        hidden_row_stride,
        hidden_stride,
        weight_stride,
        weight_row_stride,
        PAIRS,
        GROUP,
        BK,
        WHOLE,
        INTERPRET,
    )
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    z = head_logit(z, b, logit_scale, softcap, softcap_inverse, HAS_BIAS, HAS_CAP)
    # Beyond the vocabulary: after all the others, as the last group is.
    z = tl.where((column < columns)[None, :], z, -INF)
    tl.store(logits + pair[:, None] * GROUP + tl.arange(0, GROUP)[None, :], z, mask=there[:, None])


def regroup(hidden: Tensor, weight: Tensor, epilogue: Epilogue, chosen: Tensor) -> Tensor:
    """chosen [N, C] int32, groups of each row -> fp32 [N, C * GROUP]: their logits, -inf beyond the vocabulary."""
    rows, num_chosen = chosen.shape
    vocab, depth = weight.shape
    groups, pairs = count_groups(vocab), rows * num_chosen
    logits = torch.empty((rows, num_chosen * GROUP), dtype=torch.float32, device=hidden.device)
    if pairs == 0:
        return logits
    by_group, order = torch.sort(chosen.flatten())
    tile = FP32 if hidden.dtype == torch.float32 else TILE
    every = torch.arange(groups + 1, dtype=by_group.dtype, device=hidden.device)
    starts = torch.searchsorted(by_group, every)
    programs_of = (starts.diff() + (tile.BM - 1)) // tile.BM
    last_program = programs_of.cumsum(0)
    programs = min(groups, pairs) + pairs // tile.BM
    program_group = torch.searchsorted(last_program, torch.arange(programs, device=hidden.device), right=True)
    launch(
        _regroup_kernel,
        programs,
        hidden,
        weight,
        epilogue.bias,
        order,
        starts,
        program_group,
        last_program - programs_of,
        logits,
        num_chosen,
        vocab,
        depth,
        groups,
        *hidden.stride(),
        *weight.stride(),
        *epilogue[1:],
        tile.BM,
        tile.BN,
        tile.BK,
        depth % tile.BK == 0,
        INTERPRET,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return logits


def compile_cases() -> list[CompileCase]:
    cases = []
    for dtype, tile in (("bf16", TILE), ("fp16", TILE), ("fp32", FP32)):
        for full in (False, True):  # bias, softcap and an H that BK does not divide
            constexprs = {
                "hidden_stride": 1,
                "weight_stride": 1,
                "HAS_BIAS": full,
                "HAS_CAP": full,
                "PAIRS": tile.BM,
                "GROUP": tile.BN,
                "BK": tile.BK,
                "WHOLE": not full,
                "INTERPRET": False,
            }
            names = {
                **dict.fromkeys(("hidden", "weight"), f"*{dtype}"),
                "bias": "*fp32",
                **dict.fromkeys(("order", "starts", "program_group", "first_program"), "*i64"),
                "logits": "*fp32",
                **dict.fromkeys(("chosen", "columns", "depth", "groups"), "i32"),
                **dict.fromkeys(("hidden_row_stride", "hidden_stride", "weight_row_stride", "weight_stride"), "i32"),
                **dict.fromkeys(("logit_scale", "softcap", "softcap_inverse"), "fp32"),
            }
            cases.append(
                CompileCase(
                    name=f"regroup-{dtype}{'-full' if full else ''}",
                    kernel=_regroup_kernel,
                    signature={**names, **dict.fromkeys(constexprs, "constexpr")},
                    constexprs=constexprs,
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    max_registers=255,
                    divisible=(
                        *("hidden", "weight", "bias", "order", "starts", "program_group", "first_program", "logits"),
                        *("columns", "depth", "hidden_row_stride", "weight_row_stride"),
                    ),
                )
            )
    return cases
