"""What a call costs its host: python -m bench.host_time.

Microseconds from call to return of small calls, beside the torch code that each replaces (the providers of
bench/families). On a GPU (--device cuda) nothing is waited for, so these are the times in which the CPU queues the
work. On a CPU the kernels compile for sm_90 and a stand-in driver launches them into nothing, so asyncopd's times are
those of its Python; torch's include the arithmetic of its own CPU kernels, at N=8, V=1024, K=16 a small part.

Times are the best of many rounds that go round all calls; a round calls each several times.
"""

import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import asyncopd
from bench.cases import Case, FamilyName, Model
from bench.families import EAGER, FAMILIES, OURS
from bench.families.gather import torch_gather
from bench.families.kl import torch_reverse_kl
from bench.inputs import LogitsInputs, LossInputs, logits_inputs, loss_inputs
from bench.launch_check.driver import stand_in
from bench.measure import Call
from bench.results import Environment, environment
from bench.suite import checked_device

TINY = Model("tiny", 1024, 64)
ROWS, HEAD, SAMPLES = 8, 4, 12  # K = 16
PIECE = "piece"
WARM_UP, BURST = 5, 5  # calls before the first round; calls of a round


@dataclass(frozen=True, slots=True)
class HostTime:
    """A line of the results."""

    call: str
    provider: str
    us: float  # the best round's mean
    median_us: float
    launches: int | None  # of Triton kernels in one call; None on a GPU, where nobody counts
    shape: str
    host: str  # the CPU
    triton: str
    environment: Environment


Calls = dict[tuple[str, str], Call]  # by name of the call and provider


def case(family: FamilyName, head: int = HEAD, samples: int = SAMPLES) -> Case:
    return Case(family, TINY, ROWS, "ci", head=head, samples=samples)


def _of_family(family: FamilyName, device: torch.device, head: int = HEAD, samples: int = SAMPLES) -> dict[str, Call]:
    """As the benchmark's suite calls them."""
    inputs = FAMILIES[family].inputs(case(family, head, samples), device)
    return {name: FAMILIES[family].provider(name).prepare(inputs) for name in (EAGER, OURS)}


def _gather_forward(inputs: LogitsInputs) -> dict[str, Call]:
    logits = inputs.logits.detach().requires_grad_()
    return {EAGER: lambda: torch_gather(logits, inputs.ids), OURS: lambda: asyncopd.gather_logprobs(logits, inputs.ids)}


def _loss_forward(inputs: LossInputs) -> dict[str, Call]:
    student, support = inputs.student_logprobs, inputs.support
    scores = (support.teacher_logprobs, support.log_weights)
    return {
        EAGER: lambda: torch_reverse_kl(student, *scores),
        OURS: lambda: asyncopd.reverse_kl(student, support),
    }


def compared(device: torch.device) -> Calls:
    """Every call by torch eager and by asyncopd. Inputs are made here, before a stand-in driver is there."""
    found: dict[str, dict[str, Call]] = {
        "topk_logprobs": _of_family("topk", device),
        "sample_support, 16 + 48": _of_family("support", device, 16, 48),
        "gather_logprobs": _gather_forward(logits_inputs(case("gather"), device)),
        "gather_logprobs, forward + backward": _of_family("gather", device),
        "reverse_kl": _loss_forward(loss_inputs(case("kl"), device)),
        "reverse_kl, forward + backward": _of_family("kl", device),
        "linear_reverse_kl, exact, forward + backward": _of_family("exact_head", device),
        "linear_reverse_kl, sampled, forward + backward": _of_family("sampled_head", device),
    }
    return {(name, provider): call for name, calls in found.items() for provider, call in calls.items()}


def pieces(device: torch.device) -> Calls:
    """What calls are made of: one launch of a kernel of 16 arguments, by Triton's own path and by ours."""
    from asyncopd.kernels import summary

    logits = torch.zeros(ROWS, TINY.vocab, device=device)
    groups = summary.count_groups(TINY.vocab)
    peaks, tile = torch.zeros(ROWS, groups, device=device), torch.zeros(ROWS, 1, device=device)
    sizes = (logits.stride(0), groups, TINY.vocab, groups, 1)
    arguments: tuple[Any, ...] = (
        *(logits, peaks, peaks, tile, tile),
        *sizes,
        *(1.4426950216293335, 0.0),
        *(summary.GROUP, summary.TILE_GROUPS, True, False),
    )
    kernel = summary._summary_kernel
    calls: Calls = {("launch by kernel[grid]", PIECE): lambda: kernel[(ROWS,)](*arguments, num_warps=4)}
    try:
        from asyncopd.kernels.launch import launch
    except ImportError:
        return calls
    calls["launch by asyncopd.kernels.launch", PIECE] = lambda: launch(kernel, ROWS, *arguments, num_warps=4)
    calls["torch.empty", PIECE] = lambda: torch.empty((ROWS,), device=device)
    return calls


def measure(
    calls: Mapping[tuple[str, str], Call], rounds: int, device: torch.device
) -> dict[tuple[str, str], list[float]]:
    """Microseconds of every round. A queue that is full would be waited for, so a GPU is idle before each burst."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for key, call in calls.items():
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                begin = time.perf_counter()
                for _ in range(BURST):
                    call()
                found[key].append((time.perf_counter() - begin) / BURST * 1e6)
    finally:
        gc.enable()
    return found


def launches(calls: Mapping[tuple[str, str], Call], count: Callable[[], int]) -> dict[tuple[str, str], int]:
    """Of each call, warm."""
    found = {}
    for key, call in calls.items():
        before = count()
        call()
        found[key] = count() - before
    return found


def run(device: torch.device, rounds: int) -> list[HostTime]:
    calls = compared(device)
    counted: dict[tuple[str, str], int] = {}
    if device.type == "cpu":
        with stand_in() as recorder:
            calls |= pieces(device)
            times = measure(calls, rounds, device)
            counted = launches(calls, lambda: recorder.count)
    else:
        calls |= pieces(device)
        times = measure(calls, rounds, device)
    where = environment(device, f"python -m bench.host_time --device {device.type}")
    host = environment(torch.device("cpu"), "").machine
    return [
        HostTime(
            call=name,
            provider=provider,
            us=round(min(values), 2),
            median_us=round(sorted(values)[len(values) // 2], 2),
            launches=counted.get((name, provider)),
            shape=f"N={ROWS} V={TINY.vocab} K={HEAD + SAMPLES} H={TINY.width}",
            host=host,
            triton=triton.__version__,
            environment=where,
        )
        for (name, provider), values in times.items()
    ]


def table(times: list[HostTime]) -> Table:
    """A row a call."""
    device = times[0].environment.device
    caption = "compiled kernels, launched into nothing; torch computes" if device == "cpu" else "nothing is waited for"
    out = Table("call", title=f"host time, us, {times[0].host}, device {device}", caption=caption)
    for column in (EAGER, OURS, "ratio", "launches"):
        out.add_column(column, justify="right")
    us = {(line.call, line.provider): line.us for line in times}
    for line in times:
        if line.provider == EAGER:
            continue
        eager = us.get((line.call, EAGER))
        cells = (
            ("", f"{line.us:.1f}", "")
            if eager is None
            else (f"{eager:.1f}", f"{line.us:.1f}", f"{line.us / eager:.2f}")
        )
        out.add_row(escape(line.call), *cells, "" if line.launches is None else str(line.launches))
    return out


def main(
    device: Annotated[str, typer.Option(help="cpu (stand-in driver) or cuda")] = "cpu",
    results: Annotated[Path | None, typer.Option(help="JSON lines are appended to this file; none if left out")] = None,
    rounds: Annotated[int, typer.Option(help="rounds of all calls; the best counts")] = 300,
) -> None:
    """Measure what calls cost the host, beside torch eager."""
    torch.set_num_threads(1)
    times = run(checked_device(device), rounds)
    Console(width=None if os.isatty(1) else 110).print(table(times))
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(line)) + "\n" for line in times)


if __name__ == "__main__":
    typer.run(main)
