"""Exact top-K log-probabilities of a head's logits, which are never held whole. Two forms, 2 N V H FLOPs each:

chunked   the fp32 logits of a chunk of rows, at most CHUNK_BYTES, by cuBLAS; the epilogue in place, if the head has
          one; the row summary and the selection of topk.py. Whole rows, so nothing is merged.
          4 bytes a logit written and read, 4 more each way with an epilogue.
fused     the row summary as the epilogue of the GEMM (head_summary.py), its K best groups, their logits again
          (regroup.py), the selection among those. No logits but K groups a row; 2 N K 64 H FLOPs more.

Exactness. Chunked, a logit is one number. Fused, the groups are chosen by the logits of the one product and ordered by
those of the other. Both multiply with the same instructions in the same order of k, whatever the tile, and round the
epilogue step by step, so they are the same numbers as far as an instruction's result does not depend on its tile's
width (which no vendor promises). If they were not, what is returned would still be the logits of its ids, in their
order, and miss at most elements that tie with the K-th best within that rounding of an fp32 sum.

Which is faster, by the model, at N = 8192, V = 151,936, H = 4096, K = 64 in bf16 on an H100 (3.35 TB/s; products at 700
TFLOPS by cuBLAS and 600 by plain loads, which is an assumption, not a measurement):

    chunked   14.6 ms, logits 1.5 ms written and 1.5 read, top K 0.1: 17.7 ms;  with an epilogue 20.7 ms
    fused     17.0 ms, sort and programs 0.2, pairs 1.3, top K 0.1:   18.6 ms;  with an epilogue the same

Few rows leave few to share a group with, so the fused form reads the head up to twice, which is then all the time there
is. fp32 products are not tensor cores' work, and cuBLAS is better at them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from asyncopd.backends.reference.head import Head
from asyncopd.kernels.epilogue import Epilogue
from asyncopd.kernels.gemm import product
from asyncopd.kernels.head_summary import summarize_head
from asyncopd.kernels.launch import Scale
from asyncopd.kernels.regroup import regroup
from asyncopd.kernels.summary import GROUP, count_groups, summarize
from asyncopd.kernels.topk import check_k, choose_groups, launch_topk

# What a chunk of rows may take: 883 rows of 151,936 fp32 logits, whose products take 3 times as long as reading the
# head (H100, bf16), or 13,600 rows of their summaries and 64 groups.
CHUNK_BYTES = 1 << 29
# With an epilogue, in 16 bits, from so many pairs of a row and a group on for each group of the vocabulary: a program
# of regroup.py is then half full at least. Modelled above, not measured.
FUSED_PAIRS_A_GROUP = 64


class Out(NamedTuple):
    """ids int64 [N, k], logprobs fp32 [N, k], lse fp32 [N]."""

    ids: Tensor
    logprobs: Tensor
    lse: Tensor


class Problem(NamedTuple):
    """weight [V, H] with a unit stride."""

    weight: Tensor
    epilogue: Epilogue
    scale: Scale
    k: int


def linear_topk_logprobs(hidden: Tensor, head: Head, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H] -> ids int64 [N, k], log-probabilities fp32 [N, k], LSE [N]; k up to 1024."""
    check_k("k", k, head.weight.shape[0])
    epilogue = Epilogue.of(head.bias, head.logit_scale, head.softcap)
    problem = Problem(_unit_stride(head.weight), epilogue, Scale.of(head.temperature), k)
    return extract(_unit_stride(hidden), problem, fused=fused_wins(hidden, problem))


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def fused_wins(hidden: Tensor, problem: Problem) -> bool:
    pairs_a_group = hidden.shape[0] * problem.k / max(1, count_groups(problem.weight.shape[0]))
    return not problem.epilogue.trivial and hidden.dtype != torch.float32 and pairs_a_group >= FUSED_PAIRS_A_GROUP


def extract(hidden: Tensor, problem: Problem, *, fused: bool) -> Out:
    (rows, _), vocab, k = hidden.shape, problem.weight.shape[0], problem.k
    out = Out(
        torch.empty((rows, k), dtype=torch.int64, device=hidden.device),
        torch.empty((rows, k), dtype=torch.float32, device=hidden.device),
        torch.empty(rows, dtype=torch.float32, device=hidden.device),
    )
    # The pitch keeps every row aligned for wide loads, whatever V is.
    groups = count_groups(vocab)
    pitch = groups * GROUP
    height = _chunk_height(rows, 4 * (2 * groups + min(k, groups) * (GROUP + 16) if fused else pitch))
    tile = torch.empty((0 if fused else height, pitch), dtype=torch.float32, device=hidden.device)[:, :vocab]
    for start in range(0, rows, height):
        chunk = slice(start, min(start + height, rows))
        part = Out(*(tensor[chunk] for tensor in out))
        if fused:
            _fused(hidden[chunk], problem, part)
        else:
            _chunked(hidden[chunk], problem, tile[: chunk.stop - chunk.start], part)
    return out


def _chunk_height(rows: int, row_bytes: int) -> int:
    """Rows of a chunk: about equally many in each, as many as CHUNK_BYTES hold at most, and at least one."""
    most = max(1, CHUNK_BYTES // max(1, row_bytes))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _chunked(hidden: Tensor, problem: Problem, z: Tensor, out: Out) -> None:
    """z [N, V] fp32: memory for the logits."""
    product(hidden, problem.weight.t(), z)
    problem.epilogue.apply(z)
    launch_topk(z, summarize(z, problem.scale, peaks=True, sums=False), problem.k, problem.scale, *out)


def _fused(hidden: Tensor, problem: Problem, out: Out) -> None:
    weight, epilogue, scale, k = problem
    vocab, groups = weight.shape[0], count_groups(weight.shape[0])
    row = summarize_head(hidden, weight, epilogue, scale)
    chosen = choose_groups(row.peaks, groups, k)[:, : min(k, groups)]
    z = regroup(hidden, weight, epilogue, chosen)
    summary = summarize(z, scale, peaks=True, sums=False)
    summary = summary._replace(tile_peaks=row.row_peaks[:, None], tile_sums=row.row_sums[:, None])
    launch_topk(z, summary, k, scale, *out, columns=vocab)
    # Groups are in order, so positions among their logits are in the order of ids.
    out.ids.copy_(chosen.long().gather(1, out.ids // GROUP) * GROUP + out.ids % GROUP)
