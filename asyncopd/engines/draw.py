"""Which scores are cached for a position: the draws of the estimator family, and who makes them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from asyncopd.ops import sample_support
from asyncopd.support import DrawKind

DrawName = Literal["head_tail", "samples", "token", "student_top_k", "teacher_top_k", "teacher_samples"]

KIND: dict[str, DrawKind] = {
    "head_tail": "head_tail",
    "samples": "samples",
    "token": "samples",
    "student_top_k": "top_k",
    "teacher_top_k": "top_k",
    "teacher_samples": "teacher_samples",
}
TEACHER_DRAWS = ("teacher_top_k", "teacher_samples")

# A stream of random numbers is one 63-bit integer: nothing collides, and a token's draw depends on nothing else.
_SEED_BITS, _UID_BITS, _POSITION_BITS = 14, 28, 20


def token_streams(seed: int, uids: Tensor, positions: Tensor, purpose: int) -> Tensor:
    """int64 [n] streams for sequence uids [n] at response positions [n]; purpose 0 or 1."""
    if not 0 <= seed < 1 << _SEED_BITS:
        raise ValueError(f"seed: got {seed}, expected 0..{(1 << _SEED_BITS) - 1}")
    stream = (uids + (seed << _UID_BITS) << _POSITION_BITS) + positions
    return stream * 2 + purpose


class Step(NamedTuple):
    """One decode step of n sequences."""

    tokens: Tensor  # int64 [n], drawn from the policy
    ids: Tensor | None  # int64 [n, K], the support; None where the teacher will choose it
    log_weights: Tensor | None  # fp32 [n, K]


def decode_draw(
    logits: Tensor, draw: DrawName, num_scores: int, head: int, temperature: float, streams: Sequence[Tensor]
) -> Step:
    """The next token and the support of its position, from the logits [n, V] that the decoder has."""
    if draw in ("samples", "token"):
        # The rollout's own token is one of the M independent draws.
        out = sample_support(logits, num_samples=num_scores, seed=streams[0], temperature=temperature)
        return Step(out.ids[:, 0], out.ids, out.log_weights)
    token = sample_support(logits, num_samples=1, seed=streams[0], temperature=temperature).ids[:, 0]
    if draw in TEACHER_DRAWS:
        return Step(token, None, None)
    if draw == "student_top_k":
        out = sample_support(logits, num_samples=0, head=num_scores, seed=streams[1], temperature=temperature)
    else:
        out = sample_support(
            logits,
            num_samples=num_scores - head,
            head=head,
            seed=streams[1],
            sampled_ids=token,
            temperature=temperature,
        )
    return Step(token, out.ids, out.log_weights)


def check_draw(draw: DrawName, num_scores: int, head: int, vocab_size: int) -> None:
    """Refuse numbers that cannot be drawn, before any worker starts."""
    if draw == "token" and num_scores != 1:
        raise ValueError(f"draw.num_scores: got {num_scores} with draw 'token', expected 1")
    if draw == "head_tail" and not 0 < head < num_scores:
        raise ValueError(f"draw.head: got {head}, expected 1..{num_scores - 1} (num_scores - 1)")
    if draw.endswith("top_k") and num_scores > vocab_size:
        raise ValueError(f"draw.num_scores: got {num_scores}, expected at most the vocabulary, {vocab_size}")
    if draw == "head_tail" and head > vocab_size:
        raise ValueError(f"draw.head: got {head}, expected at most the vocabulary, {vocab_size}")


def empty_support(rows: int, num_scores: int) -> tuple[Tensor, Tensor]:
    """Pads: ids -1, log-weights -inf."""
    return torch.full((rows, num_scores), -1, dtype=torch.int32), torch.full((rows, num_scores), -torch.inf)
