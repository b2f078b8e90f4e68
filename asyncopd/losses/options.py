"""The words that the losses' options take."""

from typing import Literal

Normalize = Literal["exact", "sampled"]
Tail = Literal["drop", "bucket", "renormalize"]
Baseline = Literal["none", "mean", "loo"]
Reduction = Literal["mean", "sum", "none"]
