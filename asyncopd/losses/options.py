"""The words that the losses' options take."""

from typing import Literal, get_args

Normalize = Literal["exact", "sampled"]
Tail = Literal["drop", "bucket", "renormalize"]
Baseline = Literal["none", "mean", "loo"]
Reduction = Literal["mean", "sum", "none"]

NORMALIZE: tuple[str, ...] = get_args(Normalize)
TAILS: tuple[str, ...] = get_args(Tail)
BASELINES: tuple[str, ...] = get_args(Baseline)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
