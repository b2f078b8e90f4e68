"""One case from inputs to results: every provider is prepared and checked, its memory taken, then all are timed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bench import clocks
from bench.cases import Case
from bench.families import FAMILIES, LIMIT, Provider, Wrong, providers_on
from bench.measure import Timing, interleave, peak_extra_bytes, release_memory
from bench.results import Environment, Result, Status, make_result


@dataclass(frozen=True, slots=True)
class Prepared:
    """A provider after its first, checked call; `call` is None unless the status is "ok"."""

    name: str
    status: Status
    reason: str = ""
    error: float | None = None
    call: Callable[[], object] | None = None


class DeviceFailed(RuntimeError):
    """A provider left the device in a state in which whatever is asked of it raises; the message says who and how."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A case's results, and the seconds of every round of the providers that were timed."""

    results: tuple[Result, ...]
    timings: dict[str, Timing]


def in_short(failure: Exception) -> str:
    """Type and first line of the message."""
    first_line = (str(failure).strip() or "no message").splitlines()[0]
    return f"{type(failure).__name__}: {first_line}"[:200]


def prepare(provider: Provider, inputs: Any, oracle: Any) -> Prepared:
    """Whatever goes wrong with one provider, the others are still compared: its status says what it was.

    DeviceFailed if nobody can be any more.
    """
    try:
        call = provider.prepare(inputs)
        output = call()  # also the warm-up: compilers compile, libraries load
        error = provider.check(oracle, output) if provider.check else None
    except Wrong as wrong:
        return Prepared(provider.name, "wrong", str(wrong))
    except Exception as failure:
        reason = in_short(failure)
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as broken:
                raise DeviceFailed(f"{provider.name}: {reason}") from broken
        return Prepared(provider.name, "unavailable", reason)
    return Prepared(provider.name, "ok", error=error, call=call)


def measure(
    case: Case,
    environment: Environment,
    *,
    device: torch.device,
    providers: Iterable[Provider] | None = None,
    rounds: int | None = None,
    budget_s: float = 3.0,
) -> Measured:
    """Run a case on everybody who is compared on this device, or on those given. Wrong ones are never timed."""
    providers = providers_on(device.type, case.family) if providers is None else providers
    family = FAMILIES[case.family]
    inputs = family.inputs(case, device)
    oracle = family.oracle(inputs)
    prepared = [prepare(p, inputs, oracle) for p in providers]
    calls = {p.name: p.call for p in prepared if p.call is not None}
    peaks = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
    begin = clocks.now()
    timings = interleave(calls, device=device, rounds=rounds, budget_s=budget_s)
    clock = clocks.median_mhz(begin)
    results = tuple(
        make_result(
            case,
            p.name,
            environment,
            status=p.status,
            reason=p.reason,
            error=p.error,
            timing=timings.get(p.name),
            limit=timings.get(LIMIT),
            peak_bytes=peaks.get(p.name),
            clock_mhz=clock if p.name in timings else None,
        )
        for p in prepared
    )
    del calls, prepared, inputs, oracle
    release_memory()
    return Measured(results, timings)
