"""What is cached for a position, and what the extraction ops return.

A support holds K entries `(id_i, log q_i, log w_i)` a row. `w_i` is the Horvitz-Thompson weight of the draw: the sum
over i of w_i f(id_i) estimates the sum of f over the whole vocabulary. Pads are id -1 with -inf twice.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

DrawKind = Literal["top_k", "samples", "head_tail", "teacher_samples"]


class TopK(NamedTuple):
    """The K most probable ids of each row, largest first, smaller id first among ties."""

    ids: Tensor  # int64 [N, K]
    logprobs: Tensor  # fp32 [N, K], fp64 for fp64 logits
    logsumexp: Tensor  # [N], of the logits over temperature


class Draw(NamedTuple):
    """A support drawn from a policy: `head` entries by rank, then independent samples from the rest."""

    ids: Tensor  # int64 [N, K]
    log_weights: Tensor  # [N, K]; 0 in the head
    logprobs: Tensor  # [N, K] under the policy it was drawn from
    logsumexp: Tensor  # [N]


@dataclass(frozen=True, slots=True)
class Support:
    """What the losses are taken over, and what travels from the teacher to the learner.

    Args:
        ids: [N, K] int32 or int64; -1 pads. An id may occur more than once (independent samples do).
        teacher_logprobs: [N, K] log q at the ids, normalised over the whole vocabulary.
        log_weights: [N, K] log of the Horvitz-Thompson weights; 0 for a truncated sum (top-k).
        draw: how the ids were chosen, if known: "top_k", "samples" (independent draws from the behaviour policy, the
            sampled token of classic OPD being one of them), "head_tail" or "teacher_samples". Without it the losses
            read the weights: an entry of log-weight 0 counts as certain.
    Raises: TypeError, ValueError naming the field.
    """

    ids: Tensor
    teacher_logprobs: Tensor
    log_weights: Tensor
    draw: DrawKind | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "teacher_logprobs", "log_weights"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"Support.{name}: got {type(value).__name__}, expected a tensor")
            if value.dim() != 2 or value.shape != self.ids.shape:
                raise ValueError(f"Support.{name}: got shape {list(value.shape)}, expected [N, K] equal to that of ids")
            if value.device != self.ids.device:
                raise ValueError(f"Support.{name}: got device {value.device}, expected {self.ids.device} as ids")
        if self.ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"Support.ids: got {self.ids.dtype}, expected int32 or int64")
        for name in ("teacher_logprobs", "log_weights"):
            if not getattr(self, name).is_floating_point():
                raise TypeError(f"Support.{name}: got {getattr(self, name).dtype}, expected a float dtype")
        if self.draw is not None and self.draw not in get_args(DrawKind):
            raise ValueError(f"Support.draw: got {self.draw!r}, expected one of {get_args(DrawKind)} or None")

    @classmethod
    def from_topk(cls, topk: TopK, teacher_logprobs: Tensor | None = None) -> "Support":
        """A truncated support: the teacher's own top-K, or the student's with the teacher's scores at its ids."""
        scores = topk.logprobs if teacher_logprobs is None else teacher_logprobs
        return cls(topk.ids, scores, torch.zeros_like(scores), draw="top_k")

    def __getitem__(self, rows: slice | Tensor) -> "Support":
        """The support of some rows."""
        return Support(self.ids[rows], self.teacher_logprobs[rows], self.log_weights[rows], self.draw)


class AlignedRows(NamedTuple):
    """Rows in which row n predicts the token that row n scores."""

    rows: Tensor  # [B * (L - 1), H or V], the states that predict
    targets: Tensor  # [B * (L - 1)], the tokens they predict; ignored ones as they came
    mask: Tensor  # bool [B * (L - 1)], which rows count


def align_rows(states: Tensor, labels: Tensor, *, ignore_index: int = -100) -> AlignedRows:
    """Shift states by one position against their labels, and turn ignored labels into a mask.

    Args:
        states: [B, L, D] hidden states or logits; the state at position t predicts the token at t + 1.
        labels: [B, L] token ids, `ignore_index` where nothing is to be learned (prompts, padding, and the first token
            of every sequence that is packed behind another).
    Scores of a teacher or a support for the token at position t belong to the row of position t - 1.
    """
    if states.dim() != 3:
        raise ValueError(f"states: got shape {list(states.shape)}, expected [B, L, D]")
    if labels.shape != states.shape[:2]:
        raise ValueError(f"labels: got shape {list(labels.shape)}, expected {list(states.shape[:2])}")
    targets = labels[:, 1:].reshape(-1)
    return AlignedRows(states[:, :-1].reshape(-1, states.shape[-1]), targets, targets != ignore_index)
