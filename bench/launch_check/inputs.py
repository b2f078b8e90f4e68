"""Tensors for the cases: values that the ops accept, in the layouts, dtypes and sizes that options name."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asyncopd import Support
from bench.launch_check.pairwise import Rule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
FLOATS = ("bf16", "fp16", "fp32")
IDS = {"int64": torch.int64, "int32": torch.int32}
LAYOUTS = ("contiguous", "rows apart", "transposed", "rows 2^31 apart")
WIDTH = 64  # H of heads: one step of a product


@dataclass(frozen=True, slots=True)
class Size:
    rows: int
    vocab: int
    k: int


# Triton compiles variants for multiples of 16 and for 1: so usual sizes, whose blocks are those in use, and the others.
LOGITS = {"usual": Size(4, 151_936, 64), "ones": Size(1, 999, 1)}
HEADS = {"usual": Size(6, 40_000, 64), "ones": Size(1, 999, 1)}  # tiles of 4,096 columns, as at any larger vocabulary
# 12 rows of 64 are two programs of the [N, K] loss, whose sums another kernel adds.
SCORES = {"usual": Size(12, 1000, 64), "ones": Size(1, 1000, 1)}
# A stride of more than 32 bits needs no memory where there is one row.
FAR_ROWS = Rule(("layout", "size"), lambda layout, size: layout != "rows 2^31 apart" or size == "ones")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of a contiguous matrix in a layout."""
    rows, columns = tensor.shape
    if layout == "rows apart":  # by no multiple of 16
        wide = tensor.new_zeros(rows, columns + 3)
        wide[:, :columns] = tensor
        return wide[:, :columns]
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "rows 2^31 apart":
        return tensor.as_strided(tensor.shape, (2**31 + 64, 1))
    return tensor


def matrix(rows: int, columns: int, dtype: str, layout: str = "contiguous") -> Tensor:
    """Values of many sizes, without a random generator's time."""
    values = torch.arange(rows * columns, dtype=torch.float32).remainder_(17.0).sub_(8.0)
    return laid_out(values.view(rows, columns).to(DTYPES[dtype]), layout)


def some_ids(size: Size, dtype: str) -> Tensor:
    """Some equal, some not, one of them a pad where there are three."""
    ids = torch.arange(size.rows * size.k).mul_(7919).remainder_(size.vocab).view(size.rows, size.k)
    ids[:, -1] = ids[:, 0]
    if size.k > 2:
        ids[0, 1] = -1
    return ids.to(IDS[dtype])


def head_bias(vocab: int, dtype: str, kind: str | None) -> Tensor | None:
    """kind: None, "same" as the head's dtype, or a dtype"""
    return None if kind is None else torch.ones(vocab, dtype=DTYPES[dtype if kind == "same" else kind])


def some_mask(rows: int, kind: str | None) -> Tensor | None:
    """Every third row is masked."""
    if kind is None:
        return None
    mask = torch.arange(rows) % 3 != 1
    return mask if kind == "bool" else mask.to(torch.int64)


def log_weights(rows: int, k: int, draw: str | None) -> Tensor:
    """0 in what was not drawn."""
    weights = torch.full((rows, k), 0.5)
    if draw in (None, "top_k"):
        weights.zero_()
    if draw == "head_tail":
        weights[:, : k // 2] = 0.0
    return weights


def support(size: Size, draw: str | None, teacher: str, ids: str, layout: str = "contiguous") -> Support:
    """teacher, ids: their dtypes"""
    scores = laid_out(torch.full((size.rows, size.k), -2.0, dtype=DTYPES[teacher]), layout)
    weights = log_weights(size.rows, size.k, draw)
    return Support(some_ids(size, ids), scores, weights, draw)  # type: ignore[arg-type]


def wants_grad(tensor: Tensor, wanted: bool = True) -> Tensor:
    """A leaf in the same layout."""
    return tensor.detach().requires_grad_(wanted)


def backward(output: Any) -> None:
    """Of a loss, or of the rows of one."""
    loss = output[0] if isinstance(output, tuple) else output
    loss.backward(torch.ones_like(loss) if loss.dim() else None)
