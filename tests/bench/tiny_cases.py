"""Cases that take milliseconds, for the tests of the benchmarks' own workings."""

from dataclasses import replace

import torch

from bench.cases import CASES, Case, Model
from bench.results import Environment

TINY = Model("tiny", 403, 24)
CPU = torch.device("cpu")
ENVIRONMENT = Environment("a machine", 1, "AVX2", "3", "2", "0", "abc", "2026-01-31", "a command")


def tiny(family: str, dtype: torch.dtype = torch.float32, masked: float = 0.0, rows: int = 21) -> Case:
    case = next(case for case in CASES if case.family == family)
    return replace(case, model=TINY, rows=rows, head=3, samples=5, dtype=dtype, masked=masked, size="ci", headline=True)
