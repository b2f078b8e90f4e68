"""Compile every GPU kernel for every architecture, print what it takes, hold the gate: python -m bench.compile_gpu.

The exit status is 1 if a kernel uses local memory or fp64, exceeds its register budget or a block's shared memory, or
does not compile; every violation is named. Triton has to be there, a wheel is all it takes. Where there is no nvcc that
is said, and CUDA's lines in the results stay as they were.
"""

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.compile_gpu import cuda_sources, triton_kernels
from bench.compile_gpu.cuda_sources import CudaJob
from bench.compile_gpu.kernel import ROOT, Kernel
from bench.compile_gpu.triton_kernels import TritonJob

# In a folder of its own: the files beside it are of times.
FILE = ROOT / "bench" / "results" / "compiled" / "kernels.jsonl"
PROCESSES = 2

Job = TritonJob | CudaJob


@dataclass(frozen=True, slots=True)
class Outcome:
    kernels: list[Kernel]
    seconds: float
    failure: str = ""  # what the compiler said


def run(job: Job) -> Outcome:
    try:
        return Outcome(*job.run())
    except Exception as error:
        return Outcome([], 0.0, f"{job}: {type(error).__name__}: {error}")


def compile_all(jobs: Sequence[Job]) -> list[Outcome]:
    """In the order of the jobs, whoever finishes first. Spawned: a fork would share what a compiler's threads hold."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), mp_context=spawn) as pool:
        return list(pool.map(run, jobs))


def table(outcomes: Sequence[Outcome]) -> Table:
    columns = ("sm", "registers (budget)", "shared B", "stack B", "local", "fp64", "load B", "store B", "compile s")
    out = Table("kernel", caption="widest global load and store of a thread; seconds of this run, about 0 from a cache")
    for name in columns:
        out.add_column(name, justify="right")
    rows = [(kernel, outcome.seconds) for outcome in outcomes for kernel in outcome.kernels]
    source = name = ""
    for kernel, seconds in sorted(rows, key=lambda row: row[0].key):
        if kernel.source != source:
            source = kernel.source
            out.add_section()
            out.add_row(f"[bold]{source}[/bold] ({kernel.compiler})")
        cells = (
            kernel.arch,
            f"{kernel.registers} ({kernel.max_registers})",
            kernel.shared_bytes,
            kernel.stack_bytes,
            kernel.local_bytes + kernel.local_accesses,
            kernel.fp64_instructions,
            kernel.load_bytes,
            kernel.store_bytes,
            f"{seconds:.1f}",
        )
        repeated = kernel.name == name
        name = kernel.name
        out.add_row("" if repeated else f"  {escape(name)}", *map(str, cells), style="red" if kernel.violations else "")
    return out


def store(path: Path, kernels: Sequence[Kernel], compiled: set[str]) -> None:
    """In an order that does not depend on the run. `compiled`: the languages whose earlier lines are replaced."""
    kept: list[Kernel] = []
    if path.exists():
        kept = [Kernel(**json.loads(line)) for line in path.read_text().splitlines()]
    lines = [*kernels, *(kernel for kernel in kept if kernel.language not in compiled)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dataclasses.asdict(k)) + "\n" for k in sorted(lines, key=lambda k: k.key)))


def check(jobs: Sequence[Job], console: Console) -> tuple[list[Kernel], list[str]]:
    """The kernels, and every reason to fail."""
    outcomes = compile_all(jobs)
    kernels = [kernel for outcome in outcomes for kernel in outcome.kernels]
    console.print(table(outcomes))
    failures = [outcome.failure for outcome in outcomes if outcome.failure]
    return kernels, failures + [violation for kernel in kernels for violation in kernel.violations]


def main(
    results: Annotated[Path, typer.Option(help="where the JSON lines go")] = FILE,
) -> None:
    """Compile every GPU kernel ahead of time and fail if one spills, computes in fp64 or exceeds its budget."""
    console = Console(width=None if os.isatty(1) else 150)
    if reason := triton_kernels.reason_unavailable():
        console.print(f"[red]triton kernels cannot be checked: {reason}[/red]")
        raise typer.Exit(1)
    jobs: list[Job] = [*triton_kernels.jobs()]
    compiled = {"triton"}
    if reason := cuda_sources.reason_unavailable():
        console.print(f"[yellow]csrc/cuda/*.cu were skipped: {reason}[/yellow]")
    else:
        jobs += cuda_sources.jobs()
        compiled.add("cuda")
    kernels, failures = check(jobs, console)
    store(results, kernels, compiled)
    for failure in failures:
        console.print(failure, style="red", markup=False, highlight=False)
    console.print(f"{len(kernels)} compiled kernels, {len(failures)} violations")
    if failures:
        raise typer.Exit(1)
