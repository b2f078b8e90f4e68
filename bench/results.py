"""Results as JSON lines: one file a machine and day, one line a case and provider."""

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

import asyncopd
from bench.cases import Case
from bench.ceilings import Ceilings
from bench.measure import Timing

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

# "ok" is timed; "wrong" is not, its error is kept; "unavailable" cannot run here, `reason` says why.
Status = Literal["ok", "wrong", "unavailable"]


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and with what results were measured."""

    machine: str  # CPU or GPU name
    threads: int  # of torch on the CPU
    instruction_set: str  # best of the CPU
    python: str
    torch: str
    asyncopd: str
    commit: str  # with "-dirty" if the tree had changes
    date: str
    command: str
    device: Literal["cpu", "cuda"] = "cpu"
    copy_gb_per_s: float | None = None  # of a large copy, bytes read plus bytes written (bench.ceilings)
    gemm_gflop_per_s: float | None = None  # of a large matrix product in the dtype that the device is made for


@dataclass(frozen=True, slots=True)
class Result:
    """One provider on one case. Times, rates and memory are None unless the status is "ok"."""

    family: str
    case: str
    model: str
    shape: str
    dtype: str
    masked: float
    headline: bool
    provider: str
    status: Status
    reason: str
    bound: Literal["bytes", "flops"]  # which of the rates below is compared with the limit
    rounds: int
    median_s: float | None
    min_s: float | None
    gb_per_s: float | None  # the case's least bytes over `time_s`
    gflop_per_s: float | None  # likewise; None where a family does no products
    share_of_limit: float | None  # `time_s` of the limit over `time_s`
    peak_bytes: int | None
    error: float | None
    environment: Environment
    clock_mhz: float | None = None  # of a GPU while the case was timed, median

    @property
    def key(self) -> tuple[str, str]:
        return self.case, self.provider

    @property
    def time_s(self) -> float | None:
        """What is compared. CPUs are shared and their noise only adds: the best. Of a GPU's many rounds, the median."""
        return self.median_s if self.environment.device == "cuda" else self.min_s

    @property
    def share_of_machine(self) -> float | None:
        """Rate over that of a copy or of a matrix product in the same run; None where these were not measured."""
        e = self.environment
        rate, ceiling = (
            (self.gb_per_s, e.copy_gb_per_s) if self.bound == "bytes" else (self.gflop_per_s, e.gemm_gflop_per_s)
        )
        return rate / ceiling if rate and ceiling else None


def _time(timing: Timing | None, environment: Environment) -> float | None:
    if timing is None:
        return None
    return timing.median if environment.device == "cuda" else timing.best


def make_result(
    case: Case,
    provider: str,
    environment: Environment,
    *,
    status: Status = "ok",
    reason: str = "",
    timing: Timing | None = None,
    limit: Timing | None = None,
    peak_bytes: int | None = None,
    error: float | None = None,
    clock_mhz: float | None = None,
) -> Result:
    time, limit_time = _time(timing, environment), _time(limit, environment)
    work = case.work
    return Result(
        family=case.family,
        case=case.name,
        model=case.model.name,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        masked=case.masked,
        headline=case.headline,
        provider=provider,
        status=status,
        reason=reason,
        bound=work.bound,
        rounds=len(timing.seconds) if timing else 0,
        median_s=timing.median if timing else None,
        min_s=timing.best if timing else None,
        gb_per_s=work.bytes / time / 1e9 if time else None,
        gflop_per_s=work.flops / time / 1e9 if time and work.flops else None,
        share_of_limit=limit_time / time if time and limit_time else None,
        peak_bytes=peak_bytes,
        error=error,
        environment=environment,
        clock_mhz=clock_mhz,
    )


def environment(device: torch.device, command: str, ceilings: Ceilings | None = None) -> Environment:
    return Environment(
        machine=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        threads=torch.get_num_threads(),
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        python=platform.python_version(),
        torch=torch.__version__,
        asyncopd=asyncopd.__version__,
        commit=_commit(),
        date=datetime.date.today().isoformat(),
        command=command,
        device="cuda" if device.type == "cuda" else "cpu",
        copy_gb_per_s=ceilings.copy_gb_per_s if ceilings else None,
        gemm_gflop_per_s=ceilings.gemm_gflop_per_s if ceilings else None,
    )


def default_path(e: Environment) -> Path:
    name = e.machine if e.device == "cuda" else f"{e.machine} {e.threads} threads"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{slug}-{e.date}.jsonl"


def store(path: Path, results: Iterable[Result]) -> None:
    """Add results to a file; those of the same case and provider are replaced, so a run can be taken up again."""
    kept = {result.key: result for result in (load(path) if path.exists() else [])}
    kept.update({result.key: result for result in results})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in kept.values()))
    partial.replace(path)


def load(path: Path) -> list[Result]:
    """Raises ValueError for a line that this version did not write."""
    results = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            results.append(Result(**{**values, "environment": Environment(**values["environment"])}))
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}, line {number}: not a result of this version ({error})") from error
    return results


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@cache
def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Results written by this very run are no change of what is measured.
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):  # a copy of the files alone
        return os.environ.get("ASYNCOPD_COMMIT", "unknown")
