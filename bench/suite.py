"""One size class on one device: python -m bench.suite --size gpu --device cuda --results FILE --budget-s 240 --no-peers

A case is stored when it has been measured, and one that is in the file already is not measured again: the same command
takes a run up where it ended. Exit status: 0 all cases are there and asyncopd's lines are right; 1 one of them is wrong
or broke; 3 the budget ended first; 4 the device failed, which ends the process: the next one goes on after that case.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast, get_args

import torch
import typer

from asyncopd.backends import BackendUnavailable
from bench import ceilings
from bench.cases import Case, Size, cases_of
from bench.clocks import beside
from bench.families import LIMIT, OURS, Provider, providers_on
from bench.measure import release_memory
from bench.report import print_report, seconds
from bench.results import Environment, Result, default_path, environment, load, make_result, store
from bench.run import in_short, measure

BUDGET_ENDED, DEVICE_FAILED = 3, 4


def missing(case: Case, device: torch.device, stored: set[tuple[str, str]], peers: bool) -> list[Provider]:
    """Those who have no line yet, and the limit with them: a clock that is lower now lowers both."""
    everybody = providers_on(device.type, case.family, peers=peers)
    if all((case.name, provider.name) in stored for provider in everybody):
        return []
    return [p for p in everybody if p.name == LIMIT or (case.name, p.name) not in stored]


def lost(case: Case, providers: Sequence[Provider], where: Environment, failure: Exception) -> list[Result]:
    """The lines of a case that took the device with it: after that nobody's figures can be believed."""
    return [
        make_result(case, provider.name, where, status="unavailable", reason=f"the case broke: {in_short(failure)}")
        for provider in providers
    ]


def measured(
    case: Case, providers: Sequence[Provider], device: torch.device, where: Environment, case_budget_s: float
) -> tuple[list[Result], bool]:
    """Results, and whether the device is still to be trusted."""
    try:
        results = list(measure(case, where, device=device, providers=providers, budget_s=case_budget_s).results)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError as failure:  # of the inputs: the device is well
        results = lost(case, providers, where, failure)
    except RuntimeError as failure:
        return lost(case, providers, where, failure), False
    release_memory()
    return results, True


def main(
    size: Annotated[str, typer.Option(help="ci, full (with ci) or gpu: see bench/cases.py")] = "gpu",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    results: Annotated[Path | None, typer.Option(help="JSON lines; left out: bench/results/MACHINE-DATE.jsonl")] = None,
    budget_s: Annotated[float, typer.Option(help="no case is begun after this many seconds")] = 240.0,
    case_budget_s: Annotated[float, typer.Option(help="seconds of timed rounds of a case")] = 3.0,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    peers: Annotated[bool, typer.Option(help="others than the limit, torch.compile and asyncopd too")] = True,
) -> None:
    """Measure every case of a size on a device, everybody side by side; run again, it goes on."""
    begin = time.perf_counter()
    place = checked_device(device)
    cases = [case for case in cases_of(checked_size(size)) if only in case.name]
    if not cases:
        raise typer.BadParameter(f"no case of size {size!r} has {only!r} in its name", param_hint="--only")
    # Not the arguments as they came: a folder of this machine is nobody else's business.
    command = f"python -m bench.suite --size {size} --device {device}"
    where = environment(place, command, ceilings.measure(place))
    path = results or default_path(where)
    stored = {result.key for result in load(path)} if path.exists() else set()
    print(f"copy {where.copy_gb_per_s:,.0f} GB/s, matrix product {where.gemm_gflop_per_s:,.0f} GFLOP/s")
    for case in cases:
        providers = missing(case, place, stored, peers)
        if not providers:
            continue
        if time.perf_counter() - begin > budget_s:
            print(f"{budget_s:g} s are over before {case.name}; run again to go on")
            raise typer.Exit(BUDGET_ENDED)
        started = time.perf_counter()
        lines, trusted = measured(case, providers, place, where, case_budget_s)
        # The limit's first line stays: it is of the same rounds as asyncopd's.
        lines = [line for line in lines if line.key not in stored]
        store(path, lines)
        print(f"{case.name}: {time.perf_counter() - started:.1f} s{beside(lines[0].clock_mhz)}", flush=True)
        print("".join(f"  {line.provider}: {in_words(line)}\n" for line in lines), end="", flush=True)
        if not trusted:
            print(f"{lines[0].reason}; run again to go on with the next case")
            # Without ceremony: what a failed device has left in the interpreter may not even be freed.
            sys.stdout.flush()
            os._exit(DEVICE_FAILED)
    wanted = {case.name for case in cases}
    lines = [result for result in load(path) if result.case in wanted]
    print_report(lines)
    broken = [r for r in lines if is_failure(r)]
    for result in broken:
        print(f"{result.case}: {result.provider}: {result.status}: {result.reason}")
    if broken:
        raise typer.Exit(1)


def in_words(line: Result) -> str:
    return seconds(line.time_s) if line.status == "ok" else f"{line.status}: {line.reason}"


def is_failure(result: Result) -> bool:
    """A line of asyncopd's that should be there and right; a backend may say that it has no such op."""
    if not result.provider.startswith(OURS) or result.status == "ok":
        return False
    return result.provider == OURS or not result.reason.startswith(BackendUnavailable.__name__)


def checked_device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"got {name!r}, expected cuda or cpu", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device", param_hint="--device")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def checked_size(name: str) -> Size:
    for size in get_args(Size):
        if name == size:
            return cast(Size, size)
    raise typer.BadParameter(f"got {name!r}, expected one of {', '.join(get_args(Size))}", param_hint="--size")


if __name__ == "__main__":
    typer.run(main)
