"""Block sizes by measurement, for those who ask for it: ASYNCOPD_AUTOTUNE=FILE.

Without it they come from the kernels' cost models, at once. With it the first call at a shape times the candidates on
its device, waiting for it, and appends what it chose to FILE, a JSON line each; later calls and other processes find
it there, and what has been recorded on one machine can be taken to another of its kind. Every candidate is compiled
ahead of time and held to its budget by `make check-gpu`, as the default is. While a CUDA graph is captured nothing can
be timed: then the default is taken, so call once before.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

VARIABLE = "ASYNCOPD_AUTOTUNE"
T = TypeVar("T", bound=tuple[Any, ...])


def choose(kernel: str, shape: dict[str, int | str], candidates: Sequence[T], run: Callable[[T], object]) -> T:
    """The fastest candidate for a kernel at a shape; the first, which is the default, unless tuning is asked for.

    run: launches the kernel with a candidate, on outputs that nobody needs.
    Raises: ValueError where the file is not what this function writes.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return candidates[0]
    key = json.dumps({"device": _device_name(), "kernel": kernel, **shape}, sort_keys=True)
    choices = _recorded(path)
    known = [candidate for candidate in candidates if list(candidate) == choices.get(key)]
    if known:
        return known[0]
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times = [_milliseconds(lambda candidate=candidate: run(candidate)) for candidate in candidates]
    best = candidates[times.index(min(times))]
    choices[key] = list(best)
    timed = [[list(candidate), round(ms, 4)] for candidate, ms in zip(candidates, times, strict=True)]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    line = {**json.loads(key), "choice": list(best), "ms": timed, **versions}
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")
    return best


@cache
def _recorded(path: str) -> dict[str, list[int]]:
    """Choices by device, kernel and shape. Read once a process, and then kept up to date by `choose`."""
    choices = {}
    if Path(path).exists():
        for number, text in enumerate(Path(path).read_text().splitlines(), 1):
            try:
                line = json.loads(text)
                choice = line.pop("choice")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{VARIABLE}: line {number} of {path} is no recorded choice ({error!r})") from None
            shape = {name: value for name, value in line.items() if name not in ("ms", "torch", "triton")}
            choices[json.dumps(shape, sort_keys=True)] = choice
    return choices


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"


def _milliseconds(run: Callable[[], object]) -> float:
    """Median, with a cold L2."""
    return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))
