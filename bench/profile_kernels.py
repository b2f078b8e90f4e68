"""Where the time of asyncopd goes, kernel by kernel: python -m bench.profile_kernels --device cuda --results FILE

For every headline case: the time of a call with a cold L2, the time that the CPU needs to queue it, and the kernels of
one call with their number and time, by torch's profiler. What the kernels do not add up to is the gaps between them.
On a CPU the rows are torch's operators. A case that is in FILE already is left out.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import clocks, lines, results
from bench.cases import Case, cases_of
from bench.families import FAMILIES, OURS
from bench.measure import Stopwatch, release_memory
from bench.run import in_short
from bench.suite import checked_device, checked_size

ROUNDS = 5
SHOWN = 12  # kernels of a case in the printed line; the file has all


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    count: int
    ms: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One call; `kernels` by falling time."""

    ms: float  # median of ROUNDS
    host_ms: float  # until the call returned, the least of ROUNDS
    kernels: tuple[Kernel, ...]

    @property
    def in_kernels_ms(self) -> float:
        return sum(kernel.ms for kernel in self.kernels)


def profiled(call: Callable[[], object], device: torch.device) -> Profile:
    """A warm call, timed and then taken apart."""
    watch = Stopwatch(device)
    seconds = sorted(watch(call) for _ in range(ROUNDS))
    host = min(_host_seconds(call, device) for _ in range(ROUNDS))
    return Profile(1e3 * seconds[ROUNDS // 2], 1e3 * host, _kernels(call, watch, device))


def _host_seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    output = call()
    seconds = time.perf_counter() - begin
    del output
    return seconds


def _kernels(call: Callable[[], object], watch: Stopwatch, device: torch.device) -> tuple[Kernel, ...]:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    watch(lambda: None)  # on a GPU this reads the scratch: the L2 holds nothing of the call's
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=activities, acc_events=True) as recorded:
        output = call()
        if on_gpu:
            torch.cuda.synchronize(device)
    del output
    totals: dict[str, tuple[int, float]] = {}
    for event in recorded.events() or ():
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue
        microseconds = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        count, total = totals.get(event.name, (0, 0.0))
        totals[event.name] = count + 1, total + microseconds / 1e3
    kernels = (Kernel(name, count, ms) for name, (count, ms) in totals.items())
    return tuple(sorted(kernels, key=lambda kernel: -kernel.ms))


def in_words(name: str, p: Profile) -> str:
    shown = "; ".join(f"{k.name[:60]} x{k.count} {k.ms:.3f}" for k in p.kernels[:SHOWN])
    gaps = f"in kernels {p.in_kernels_ms:.3f}, gaps {max(0.0, p.ms - p.in_kernels_ms):.3f}"
    return f"{name}: {p.ms:.3f} ms, host {p.host_ms:.3f}, {gaps}; {shown}"


def main(
    size: Annotated[str, typer.Option(help="whose headline cases: ci, full or gpu")] = "gpu",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    path: Annotated[Path | None, typer.Option("--results", help="lines of JSON are appended here")] = None,
    only: Annotated[str, typer.Option(help="cases whose name contains this, headline or not")] = "",
    budget_s: Annotated[float, typer.Option(help="no case is begun after this many seconds")] = 60.0,
) -> None:
    """Kernels and their times, of asyncopd on every headline case."""
    begin, place = time.perf_counter(), checked_device(device)
    where = results.environment(place, "python -m bench.profile_kernels")
    have = {line.get("case") for line in lines.read(path)}
    broken = False
    for case in cases_of(checked_size(size)):
        if case.name in have or not (only in case.name if only else case.headline):
            continue
        if time.perf_counter() - begin > budget_s:
            print(f"{budget_s:g} s are over before {case.name}; run again to go on")
            raise typer.Exit(3)
        since = clocks.now()
        try:
            p = profiled(warm_call(case, place), place)
        except Exception as failure:
            print(f"{case.name}: {in_short(failure)}", flush=True)
            broken = True
            continue
        finally:
            release_memory()
        clock = clocks.median_mhz(since)
        print(in_words(case.name, p) + clocks.beside(clock), flush=True)
        lines.append(
            path,
            {"case": case.name, **dataclasses.asdict(p), "clock_mhz": clock, "environment": dataclasses.asdict(where)},
        )
    if broken:
        raise typer.Exit(1)


def warm_call(case: Case, device: torch.device) -> Callable[[], object]:
    family = FAMILIES[case.family]
    call: Callable[[], object] = family.provider(OURS).prepare(family.inputs(case, device))
    for _ in range(2):  # kernels compile, the allocator has its blocks
        call()
    return call


if __name__ == "__main__":
    typer.run(main)
