"""bench/gpu.sh, rehearsed without a GPU: it builds, tests, measures, goes on where it ended, and says what failed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import results, smoke
from bench.families import COMPILED, EAGER, FAMILIES, LIMIT, OURS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"


def gpu(out: Path, *steps: str, **variables: str) -> subprocess.CompletedProcess[str]:
    rehearsal = {"DEVICE": "cpu", "SIZE": "ci", "ONLY": "gather, embedded", "BACKENDS": "cpu", "WORKERS": "1"}
    rehearsal |= {"PARTS": "gemm", "ROUNDS": "2", "LIMIT_S": "500"}
    env = {**os.environ, **rehearsal, "OUT": str(out), "PYTHON": sys.executable, **variables}
    return subprocess.run([SCRIPT, *steps], env=env, capture_output=True, text=True, timeout=550)


def test_script_is_bash_and_refuses_steps_that_it_has_not(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    done = gpu(tmp_path, "build", "benhc")
    assert done.returncode == 2
    assert "no step benhc; there are: build smoke host probe bench profile cpu peers sanitize" in done.stderr


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
    assert "smoke" not in done.stdout.split("== build: FAILED")[1]


WITHOUT_PIPELINE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "pydantic_core", "transformers", "safetensors", "yaml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import asyncopd, bench.smoke, bench.host_time, bench.suite, bench.profile_kernels, bench.report
from bench.probe import __main__, host, rows, pack, sparse, exact, gemm
"""


def test_no_step_needs_the_packages_of_the_pipeline() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PIPELINE], env=env, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr


STEPS = ["smoke", "host", "probe", "bench", "profile"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rehearsal_on_the_cpu_goes_on_where_it_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = gpu(out, TESTS_cpu="tests/backends/no_such_test.py")
    assert first.returncode == 1, first.stdout
    assert "== cpu: FAILED" in first.stdout
    assert "no_such_test.py" in first.stdout
    assert (out / "done").read_text().split() == STEPS
    assert f"cpu: {4 * len(smoke.OPS)} calls, right" in (out / "smoke.log").read_text()
    assert "## gemm: " in (out / "probe.log").read_text()
    lines = results.load(out / "results.jsonl")
    assert {line.provider for line in lines} == {LIMIT, COMPILED, OURS}, "the peers have a step of their own"
    assert all(line.environment.copy_gb_per_s and line.environment.gemm_gflop_per_s for line in lines)
    assert lines[0].environment.command == "python -m bench.suite --size ci --device cpu"
    profile = json.loads((out / "profile.jsonl").read_text())
    assert profile["case"] == lines[0].case
    assert profile["kernels"]
    hosts = [json.loads(line) for line in (out / "host.jsonl").read_text().splitlines()]
    assert {host["provider"] for host in hosts} >= {EAGER, OURS}
    again = gpu(out, TESTS_cpu="tests/ops/test_gather.py", PEERS="1")
    assert again.returncode == 0, again.stdout
    for step in STEPS:
        assert f"== {step}: done before" in again.stdout
    assert "== cpu: done in" in again.stdout
    assert " passed" in again.stdout
    assert "--maxfail 60 --timeout 60" in (out / "cpu.log").read_text()
    both = results.load(out / "results.jsonl")
    assert both[: len(lines)] == lines
    assert {line.provider for line in both} == {p.name for p in FAMILIES["gather"].providers}
    assert (out / "triton-cache.tar.gz").exists()
    assert not (out / "triton-cache").exists()
    assert len(list(out.iterdir())) <= 17


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_op_that_breaks_ends_the_run_with_its_name(tmp_path: Path) -> None:
    """As a kernel does that refuses to launch: planted in the process of the step by Python's sitecustomize."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'bench.smoke' in sys.orig_argv:\n"
        "    import asyncopd.backends.cpu as cpu\n"
        "    def broken(*args): raise RuntimeError('Global variable NAN has changed')\n"
        "    cpu.topk_logprobs = broken\n"
    )
    done = gpu(tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout
    fault = "topk_logprobs on cpu, V=1000, bfloat16: BROKE: RuntimeError: Global variable NAN has changed"
    assert f"== an op broke, so nothing else was begun: {fault}" in done.stdout
    assert "== bench" not in done.stdout
    assert (tmp_path / "out" / "done").read_text() == ""


def test_time_that_is_over_is_said(tmp_path: Path) -> None:
    done = gpu(tmp_path / "out", "bench", LIMIT_S="9")
    assert done.returncode == 1
    assert "not begun, 9 s are over; run again to go on" in done.stdout


# What a run of the probe leaves in Triton's cache, and whether a kernel came from there: the listener is told.
COMPILE = """
import torch
from triton import knobs
from bench.launch_check.driver import stand_in
from bench.probe.pack12 import unpack_kernel
with stand_in():
    knobs.compilation.listener = lambda **told: print("cached" if told["cache_hit"] else "compiled")
    x = torch.empty(2, 512, dtype=torch.uint8)
    unpack_kernel[(2, 1)](x, x, torch.empty(2, 1), torch.empty(2, 512), 512, TILE=512, INTERPRET=False)
"""


def compiled_in(cache: Path) -> str:
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_triton_finds_its_kernels_in_the_cache_of_another_run(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert compiled_in(first / "triton-cache") == "compiled"
    packed = first / "triton-cache.tar.gz"
    gpu(first, "bench", LIMIT_S="9")  # no step is begun
    assert packed.exists()
    assert not (first / "triton-cache").exists()
    second.mkdir()
    script = SCRIPT.read_text()
    unpack = script[
        script.index("unpack_cache() {") : script.index("pack_cache() {", script.index("unpack_cache() {") + 9)
    ]
    env = {**os.environ, "OUT": str(second), "CACHE": str(packed)}
    done = subprocess.run(
        ["bash", "-c", f"{unpack}\nunpack_cache"], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"Triton's cache: 1 kernels from {packed}\n"
    assert compiled_in(second / "triton-cache") == "cached"
