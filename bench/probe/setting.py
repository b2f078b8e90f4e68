"""What the parts of the probe share: shapes, tensors, and rounds of timing whose figures are appended to a file."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import asyncopd
from bench import clocks, lines, results
from bench.measure import Call, Timing, interleave

BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows, vocabulary, width of the head, entries of a support."""

    rows: int
    vocab: int
    width: int
    k: int


SHAPE = Shape(8192, 151_936, 4096, 64)
DRY_SHAPE = Shape(64, 4096, 64, 16)


@dataclass
class Setting:
    """Where the parts run. In a dry run tensors are small and on the CPU, and every call is made once, not timed."""

    device: torch.device
    dry: bool = False
    path: Path | None = None
    part: str = ""
    environment: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, device: torch.device, *, dry: bool = False, path: Path | None = None) -> "Setting":
        torch.manual_seed(0)
        where = results.environment(device, "python -m bench.probe")
        return cls(device, dry, path, environment=dataclasses.asdict(where))

    @property
    def shape(self) -> Shape:
        return DRY_SHAPE if self.dry else SHAPE

    # --------------------------------------------------------------------------------------------------- tensors

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    @cached_property
    def hidden(self) -> Tensor:
        return self.randn(self.shape.rows, self.shape.width).to(BF16)

    @cached_property
    def weight(self) -> Tensor:
        return (2.5 / self.shape.width**0.5 * self.randn(self.shape.vocab, self.shape.width)).to(BF16)

    @cached_property
    def support(self) -> asyncopd.Support:
        rows, k = self.shape.rows, self.shape.k
        ids = torch.randint(0, self.shape.vocab, (rows, k), device=self.device)
        teacher = -12 + torch.rand(rows, k, device=self.device)
        return asyncopd.Support(ids, teacher, torch.full((rows, k), 7.0, device=self.device), draw="samples")

    # ---------------------------------------------------------------------------------------------------- timing

    def compare(
        self, calls: Mapping[str, Call], *, rounds: int = 7, note: Callable[[str, float], str] = lambda name, ms: ""
    ) -> None:
        """Time calls in rounds and say the median and the best of each; `note` adds what a name's median ms mean."""
        for call in calls.values():
            call()
        if self.dry:
            print(f"  {len(calls)} calls ran: {', '.join(calls)}", flush=True)
            return
        begin = clocks.now()
        timings = interleave(calls, device=self.device, rounds=rounds)
        clock = clocks.median_mhz(begin)
        for name, timing in timings.items():
            self.say(name, timing, note(name, 1e3 * timing.median), clock)

    def say(self, name: str, timing: Timing, note: str, clock: float | None) -> None:
        median, best = 1e3 * timing.median, 1e3 * timing.best
        print(f"  {name}: {median:.4g} ms (best {best:.4g}){note and f', {note}'}{clocks.beside(clock)}", flush=True)
        line = {"part": self.part, "call": name, "median_ms": median, "best_ms": best, "rounds": len(timing.seconds)}
        lines.append(self.path, {**line, "clock_mhz": clock, "environment": self.environment})
