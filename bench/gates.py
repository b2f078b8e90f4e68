"""Ratios that must not be lost, taken within one run: the machine's speed cancels, its noise is met by repetition.

Shared machines disturb for seconds at a time. So a gate compares the best of interleaved rounds, and where a bound does
not hold yet, takes more rounds, a bounded number of times: a disturbance passes, a slow kernel stays slow.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench.measure import Call, Timing, interleave

THREADS = 2
ATTEMPTS = 4
ATTEMPT_S = 1.0


class GateLost(AssertionError):
    """A bound did not hold after all attempts; the message has every ratio."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The best time of `call` is at most `at_most` times the best time of `against`."""

    call: str
    against: str
    at_most: float

    @classmethod
    def faster(cls, call: str, against: str, times: float) -> "Bound":
        return cls(call, against, 1.0 / times)

    def ratio(self, best: Mapping[str, float]) -> float:
        return best[self.call] / best[self.against]

    def describe(self, best: Mapping[str, float]) -> str:
        ratio = self.ratio(best)
        verdict = "holds" if ratio <= self.at_most else "LOST"
        return (
            f"{self.call} {1e3 * best[self.call]:.2f} ms / {self.against} {1e3 * best[self.against]:.2f} ms = "
            f"{ratio:.3f}, at most {self.at_most:.3f}: {verdict}"
        )


def hold(
    calls: Mapping[str, Call],
    bounds: Sequence[Bound],
    *,
    rounds: int | None = None,
    attempts: int = ATTEMPTS,
) -> dict[str, Timing]:
    """Time warm calls until every bound holds, at most `attempts` times; GateLost if one never does.

    Rounds of an attempt: as given, or as many as fit ATTEMPT_S. Short calls are best held in pairs: what disturbs one
    then disturbs the other, and a quiet moment, which gives the best times, serves both.
    """
    rounds_of = partial(interleave, device=torch.device("cpu"), rounds=rounds, budget_s=ATTEMPT_S)
    seconds: dict[str, tuple[float, ...]] = dict.fromkeys(calls, ())
    for _ in range(attempts):
        for name, timing in rounds_of(calls).items():
            seconds[name] += timing.seconds
        best = {name: min(values) for name, values in seconds.items()}
        if all(bound.ratio(best) <= bound.at_most for bound in bounds):
            return {name: Timing(values) for name, values in seconds.items()}
    raise GateLost("\n".join(["", *(bound.describe(best) for bound in bounds)]))


def reason_not_comparable() -> str | None:
    """The gates are ratios of two threads on an AVX-512 machine; elsewhere other limits bind."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        return f"the gates are for AVX-512 machines, this one has {capability}"
    if (cores := len(os.sched_getaffinity(0))) < THREADS:
        return f"the gates are for {THREADS} threads, this process may use {cores} core"
    return None
