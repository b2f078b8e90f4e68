"""What a loss does about actions that an older policy drew, beyond the importance weight that is always there."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from asyncopd.ops.checks import check_choice, check_matrix, check_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Baselines of the literature, for M-sample supports (mu is recovered from their weights). r = p / mu.

    The recommended loss has none of them: many samples, current advantage, no clip. At most one of `ratio_cap`,
    `clip_eps`, `m2_budget` at a time.

    Args:
        ratio_cap: truncated ratio, min(r, cap) in place of r.
        clip_eps: PPO clip: an entry whose ratio has left [1 - eps, 1 + eps] in the direction of its advantage has no
            gradient; its value is that of the clipped ratio.
        proximal_logprobs: [N, K] log p_prox at the ids; with `clip_eps`, decoupled PPO (AReaL, arXiv 2505.24298):
            p/p_prox is clipped, times p_prox/mu where that is at most `proximal_cap`, else 0.
        m2_budget: M2PO (arXiv 2510.01161): clip at exp(+-tau), tau such that the mean of min(log^2 r, tau^2) over the
            entries where a clip could bind, over the rows of this call, is this budget (0.04 in the paper).
        advantage: "current": A = log p - log q, recomputed; "behavior": A = log mu - log q, as it was cached.
    Raises: TypeError, ValueError naming the argument.
    """

    ratio_cap: float | None = None
    clip_eps: float | None = None
    proximal_logprobs: Tensor | None = None
    proximal_cap: float = 5.0
    m2_budget: float | None = None
    advantage: Literal["current", "behavior"] = "current"

    def __post_init__(self) -> None:
        chosen = [name for name in ("ratio_cap", "clip_eps", "m2_budget") if getattr(self, name) is not None]
        if self.proximal_cap is None:
            raise TypeError("correction.proximal_cap: got None, expected a number")
        for name in (*chosen, "proximal_cap"):
            check_positive(f"correction.{name}", getattr(self, name))
        if self.proximal_logprobs is not None:
            check_matrix("correction.proximal_logprobs", self.proximal_logprobs, "K")
        if len(chosen) > 1:
            raise ValueError(f"correction: got {' and '.join(chosen)}, expected at most one of them")
        if self.proximal_logprobs is not None and self.clip_eps is None:
            raise ValueError("correction.proximal_logprobs: given without clip_eps, expected both (decoupled PPO)")
        check_choice("correction.advantage", self.advantage, ("current", "behavior"))
