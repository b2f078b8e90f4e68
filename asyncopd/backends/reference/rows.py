"""Row chunks and the two lines of arithmetic that every op on logits shares."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one fp32 tile of logits (64 MiB). Large enough that a chunk's GEMM is not bound by re-reading the head.
TILE_ELEMENTS = 1 << 24

# Ids that are no column. ELSEWHERE is one that another shard of a split vocabulary holds, and comes to backward ops
# only: its gradient counts in the row's sum, which multiplies the softmax of every shard, and is scattered nowhere.
PAD, ELSEWHERE = -1, -2


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32: what log-probabilities, LSE, losses and gradients accumulate in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_chunks(num_rows: int, width: int, at_most: int | None = None) -> Iterator[slice]:
    """Slices over rows such that a chunk times `width` stays within a tile, and within `at_most` rows."""
    rows = max(1, min(TILE_ELEMENTS // max(width, 1), at_most or num_rows))
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def logprobs_at(logits: Tensor, lse: Tensor, ids: Tensor) -> Tensor:
    """log p at ids [C, K] from logits [C, V] (already over temperature) and lse [C]; -inf at pads (id -1)."""
    return normalized(logits.gather(1, ids.clamp(min=0).long()), lse, ids)


def normalized(logits_at_ids: Tensor, lse: Tensor, ids: Tensor) -> Tensor:
    """z - LSE at ids [C, K], without the NaN of (-inf) - (-inf); a NaN lse makes the row NaN, pads stay -inf."""
    lse = lse[:, None]
    logprobs = logits_at_ids - lse
    impossible = (logits_at_ids == -torch.inf) & ~torch.isnan(lse)
    return logprobs.masked_fill(impossible | (ids < 0), -torch.inf)


def check_ids_in_range(ids: Tensor, vocab_size: int, name: str = "ids", pads: bool = True) -> None:
    """Refuse ids outside [0, V), or -1 where pads may be. Reads the data, so only on a CPU; else gather asserts."""
    if ids.device.type == "cpu" and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < (-1 if pads else 0) or high >= vocab_size:
            expected = f"-1 (pad) or 0..{vocab_size - 1}" if pads else f"0..{vocab_size - 1}"
            raise ValueError(f"{name}: got values from {low} to {high}, expected {expected}")
