"""Run every case of every op with the stand-in driver: python -m bench.launch_check.

The exit status is 1 if a call raises, a kernel takes or computes fp64, uses a global that changes or is no number,
or if a kernel of kernels/ is launched by no case. Every failure names the op, the options and the kernel.
"""

import ast
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

import asyncopd.kernels
from bench.compile_gpu import machine_code, triton_kernels
from bench.compile_gpu.kernel import ROOT
from bench.launch_check import faults
from bench.launch_check.driver import ARCH, Compiled, stand_in
from bench.launch_check.ops import OPS, Op, describe
from bench.launch_check.pairwise import Case

PROCESSES = 2
PART = 12  # cases of a process at a time
CALLS = 2  # of a case: the second finds every kernel compiled, and may be launched in another way


@dataclass(frozen=True, slots=True)
class Part:
    """Some cases of an op, by number: functions do not travel between processes."""

    op: int
    first: int


@dataclass(slots=True)
class Outcome:
    failures: list[str] = field(default_factory=list)
    cases: int = 0
    launches: int = 0
    launched: set[str] = field(default_factory=set)  # names of kernels
    variants: set[str] = field(default_factory=set)  # of compiled kernels
    spilling: set[str] = field(default_factory=set)  # of them, those that use local memory

    def add(self, other: "Outcome") -> None:
        self.failures += other.failures
        self.cases += other.cases
        self.launches += other.launches
        self.launched |= other.launched
        self.variants |= other.variants
        self.spilling |= other.spilling


def run_cases(name: str, run: Callable[[Case], None], cases: Sequence[Case]) -> Outcome:
    """Each case, twice, in one stand-in driver."""
    out = Outcome()
    for case in cases:
        with stand_in(clear_memory=True) as recorder:
            found = []
            try:
                for _ in range(CALLS):
                    run(case)
            except Exception as error:
                found.append(told(error))
            found += [fault for kernel in recorder.compiled for fault in faults.fp64(kernel)]
            found += faults.changed_globals(recorder.launched)
        out.variants |= {kernel.variant for kernel in recorder.compiled}
        out.spilling |= {kernel.variant for kernel in recorder.compiled if spills(kernel)}
        out.failures += [f"{name}: {describe(case)}\n    {fault}" for fault in dict.fromkeys(found)]
        out.cases += 1
        out.launches += recorder.count
        out.launched |= {function.__name__ for function in recorder.launched}
    return out


def told(error: BaseException) -> str:
    """With what caused it: the compiler's own error only shows the line."""
    lines = [f"{type(error).__name__}: {error}"]
    while error.__cause__ is not None:
        error = error.__cause__
        lines.append(f"{type(error).__name__}: {error}")
    return "\n".join(lines).replace("\n", "\n    ")


def spills(kernel: Compiled) -> bool:
    (needs,) = machine_code.usage(kernel.cubin).values()
    return needs.stack_bytes + needs.local_bytes > 0


def run_part(part: Part) -> Outcome:
    torch.set_num_threads(1)
    # Triton 3.9 announces another default of an option.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    op = OPS[part.op]
    return run_cases(op.name, op.run, op.cases()[part.first : part.first + PART])


def parts(ops: Sequence[Op] = OPS) -> list[Part]:
    """The first of every op, then the second: processes side by side compile different kernels."""
    found = [Part(number, first) for number, op in enumerate(ops) for first in range(0, len(op.cases()), PART)]
    return sorted(found, key=lambda part: (part.first, part.op))


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "kernels").rglob("*.py"))


def never_launched(launched: set[str]) -> list[str]:
    """Kernels that a module of kernels/ launches and no case does."""
    sources = [path.read_text() for path in kernel_sources()]
    kernels = {name for source in sources for name in triton_kernels._jitted(source)}
    called = {name for source in sources for name in triton_kernels._launched(source) | _arguments(source)}
    return [f"{name}: launched by no case" for name in sorted((kernels & called) - launched)]


def _arguments(source: str) -> set[str]:
    """X of every `launch(X, ...)`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    return {ast.unparse(call.args[0]).rsplit(".", 1)[-1] for call in calls if "launch" in ast.unparse(call.func)}


def outcomes() -> Iterator[Outcome]:
    """Of all cases. Spawned: a fork would share what a compiler's threads hold."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), mp_context=spawn) as pool:
        yield from pool.map(run_part, parts())


def main() -> None:
    """Call every op of the triton backend with the stand-in driver; exit with 1 if anything is wrong."""
    folder = Path(asyncopd.kernels.__file__).resolve().parent
    if folder != ROOT / "kernels":
        raise SystemExit(f"asyncopd.kernels was imported from {folder}, expected {ROOT / 'kernels'}")
    begin = time.perf_counter()
    total = Outcome()
    for outcome in outcomes():
        total.add(outcome)
    failures = total.failures + never_launched(total.launched)
    for failure in failures:
        print(failure)
    # No failure: sizes here are not those that kernels are designed for, whose budgets `bench.compile_gpu` holds.
    for name, count in Counter(variant.split("(")[0] for variant in sorted(total.spilling)).items():
        print(f"{name}: {count} variants, of sizes or strides that are no multiple of 16, use local memory")
    print(
        f"{total.cases} cases, {total.launches} launches of {len(total.launched)} kernels, {len(total.variants)} "
        f"compiled for sm_{ARCH}, {len(failures)} failures, {time.perf_counter() - begin:.0f} s"
    )
    if failures:
        raise SystemExit(1)
