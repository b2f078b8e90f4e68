"""bench/gpu.sh, rehearsed without a GPU: it builds, tests, measures, goes on where it ended, and says what failed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import results
from bench.families import FAMILIES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"


def gpu(out: Path, *steps: str, **variables: str) -> subprocess.CompletedProcess[str]:
    rehearsal = {"DEVICE": "cpu", "SIZE": "ci", "ONLY": "gather, embedded", "BACKENDS": "cpu", "WORKERS": "1"}
    env = {**os.environ, **rehearsal, "OUT": str(out), "PYTHON": sys.executable, **variables}
    return subprocess.run([SCRIPT, *steps], env=env, capture_output=True, text=True, timeout=110)


def test_script_is_bash_and_refuses_steps_that_it_has_not(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    done = gpu(tmp_path, "build", "benhc")
    assert done.returncode == 2
    assert "no step benhc; there are: build cpu bench sanitize" in done.stderr


def test_interpreter_that_lacks_what_is_needed_is_said(tmp_path: Path) -> None:
    """A Python of its own folder that has none of the packages: nothing is begun after the build."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    script = tmp_path / "bench" / "gpu.sh"
    script.parent.mkdir()
    script.write_text(SCRIPT.read_text())
    env = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(bare), "DEVICE": "cpu", "BACKENDS": "cpu"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 1
    assert "not installed: torch, numpy, pytest," in done.stdout
    assert "== build: FAILED with status 1" in done.stdout
    assert "bench" not in done.stdout.split("== build: FAILED")[1]


@pytest.mark.slow
def test_rehearsal_on_the_cpu_goes_on_where_it_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = gpu(out, TESTS="tests/backends/no_such_test.py")
    assert first.returncode == 1, first.stdout
    assert "== cpu: FAILED" in first.stdout
    assert "no_such_test.py" in first.stdout
    assert "== bench: done in" in first.stdout
    assert "== sanitize: done in" in first.stdout
    assert (out / "done").read_text().split() == ["bench", "sanitize"]
    lines = results.load(out / "results.jsonl")
    assert {line.provider for line in lines} == {p.name for p in FAMILIES["gather"].providers}
    assert all(line.environment.copy_gb_per_s and line.environment.gemm_gflop_per_s for line in lines)
    assert lines[0].environment.command == "python -m bench.suite --size ci --device cpu"
    again = gpu(out, TESTS="tests/ops/test_gather.py")
    assert again.returncode == 0, again.stdout
    assert "== bench: done before" in again.stdout
    assert "== cpu: done in" in again.stdout
    assert " passed" in again.stdout
    assert results.load(out / "results.jsonl") == lines
    assert len(list(out.iterdir())) <= 8


def test_time_that_is_over_is_said(tmp_path: Path) -> None:
    done = gpu(tmp_path / "out", "bench", LIMIT_S="9")
    assert done.returncode == 1
    assert "not begun, 9 s are over; run again to go on" in done.stdout
