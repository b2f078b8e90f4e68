"""What the [N, K] loss op is asked for: its options, written once, and the metrics that it returns."""

import math
from ast import literal_eval
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

_CHOICES = {
    "divergence": ("reverse", "forward"),
    "normalize": ("exact", "sampled"),
    "tail": ("drop", "bucket", "renormalize"),
    "baseline": ("none", "mean", "loo"),
    "advantage": ("current", "behavior"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """The options of one loss, as the public functions have checked them. Forward KL reads `tail` alone.

    head_is_certain: entries of log-weight exactly 0 were not drawn (top-k, the head of head + tail).
    metrics: they are wanted; an empty tensor is returned otherwise.
    needs_policy: log mu = -log M - log w is meaningful (M-sample supports); every correction asks for it.
    Raises: ValueError for an unknown word.
    """

    divergence: str = "reverse"
    normalize: str = "exact"
    tail: str = "drop"
    baseline: str = "none"
    head_is_certain: bool = True
    needs_policy: bool = False
    advantage: str = "current"
    ratio_cap: float | None = None
    clip_eps: float | None = None
    m2_budget: float | None = None
    proximal_cap: float = 5.0
    metrics: bool = True

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(repr, choices))}"
                )

    @property
    def text(self) -> str:
        """The options in one word, for operators, which take no dataclass; `parse` is the inverse.

        One argument in place of twelve, because what torch.library does with the arguments of an operator that has a
        gradient takes time quadratic in their number (torch/_library/utils.py, fill_defaults).
        """
        return "|".join(_word(getattr(self, name)) for name in SPEC_FIELDS)

    @classmethod
    def parse(cls, text: str) -> "LossSpec":
        """The object that the text describes: always the same one, so that backends can keep what they derive from it.

        Raises: ValueError for a text that `text` does not write.
        """
        return _parse(text)


SPEC_FIELDS = tuple(field.name for field in fields(LossSpec))


def _word(option: str | bool | float | None) -> str:
    if option is None:
        return ""
    # float(): a number of numpy is a float too, but writes its type beside its value.
    return repr(option if isinstance(option, str | bool) else float(option))


@lru_cache(maxsize=1024)
def _parse(text: str) -> LossSpec:
    words = text.split("|")
    if len(words) != len(SPEC_FIELDS):
        raise ValueError(f"spec: got {text!r}, expected {len(SPEC_FIELDS)} options separated by '|'")
    try:
        options: list[Any] = [None if word == "" else _FLOATS.get(word) or literal_eval(word) for word in words]
        return LossSpec(**dict(zip(SPEC_FIELDS, options, strict=True)))
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"spec: got {text!r}, expected what LossSpec.text writes ({error})") from None


# Numbers whose representation is no literal.
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


# What the data itself rules out, in the same words whichever backend finds out.


def sampled_support_error(tail: str) -> ValueError:
    return ValueError(
        f"tail: got {tail!r} with a sampled support (log_weights other than 0), expected 'drop'; "
        "'bucket' and 'renormalize' are for top-k supports"
    )


def no_policy_error() -> ValueError:
    return ValueError(
        "correction: needs the behaviour policy, which only M-sample supports carry in their log_weights; "
        "every row of this support has entries of log-weight 0 (top-k or head + tail). "
        "If these are samples, say so: Support(..., draw='samples')"
    )


class LossMetrics(NamedTuple):
    """How a support fared, as scalars (fp32; fp64 for fp64) without gradient.

    Means over the valid rows: masked rows and rows without entries do not count; 0 if there is none. p is the
    student's probability, normalised as the loss normalises it (with tail="renormalize" as it was given).
    """

    student_mass: Tensor  # sum_i w_i p_i: what the support holds of the student; estimates 1 on sampled supports
    teacher_mass: Tensor  # sum_i w_i q_i
    ess: Tensor  # (sum_i w_i p_i)^2 / sum_i (w_i p_i)^2, the effective number of entries
    coef_sum: Tensor  # sum_i c_i, which multiplies the softmax in the head's gradient
    # Over the drawn entries, which certain ones (top-k, the head of head + tail) are not; 0 if there is none.
    # r = M w p, M the row's number of drawn entries: p/mu for M samples, p over the tail's proposal for head + tail.
    ratio_mean: Tensor
    ratio_p99: Tensor  # the smallest r that at least 99 % do not exceed; to 1 % where a histogram finds it
    clip_fraction: Tensor  # share whose gradient a cap, a clip or a drop changed
