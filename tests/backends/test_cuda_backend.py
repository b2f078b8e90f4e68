"""asyncopd/backends/cuda.py without a GPU: what it passes to the launchers, here the host's, and its errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_on_host as host
import pytest
import torch
from cuda_on_host.stand_in import Extension, install, parameters_of
from torch import Tensor

from asyncopd.backends import cuda, native, reference

pytestmark = host.NEEDED
ROOT = Path(__file__).parents[2]


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Extension:
    return install(monkeypatch.setattr)


def close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == (torch.float32 if theirs.is_floating_point() else theirs.dtype)
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=2**-23, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_topk_is_the_references(extension: Extension, rng: torch.Generator, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 10_000, generator=rng).to(dtype)
    for layout in (logits, logits[:2, 5:9000], logits.t().contiguous().t(), logits[:0]):
        expected = reference.topk_logprobs(layout.double(), 20, 0.7)
        close(cuda.topk_logprobs(layout, 20, 0.7), expected)
        arguments = extension.calls[-1][1]
        assert arguments["dtype"] == native.DTYPE_CODES[dtype]
        # 3 rows do not fill 2 multiprocessors of 4 blocks each, and no rows need nothing.
        assert (arguments["parts"] == 1) == (len(layout) == 0)


def test_shared_tests_pass_on_the_host() -> None:
    """In a process of its own: backends are chosen, and tests made for them, when pytest starts."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "cuda_on_host.stand_in",
        "-p",
        "no:cacheprovider",
        "--no-cov",
    ]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    files = ["tests/ops/test_topk.py"]
    run = subprocess.run(
        [*command, "-p", "cuda_on_host.stand_in", "-k", "cuda", *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20, run.stdout


def test_gather_is_the_references(extension: Extension, rng: torch.Generator) -> None:
    logits = torch.randn(3, 1000, generator=rng)
    for id_dtype in (torch.int32, torch.int64):
        ids = torch.randint(-1, 900, (3, 12), generator=rng).to(id_dtype)[:, ::2]
        close(
            cuda.gather_logprobs(logits[:, 7:], ids, 0.7), reference.gather_logprobs(logits[:, 7:].double(), ids, 0.7)
        )


def test_launch_errors_are_raised_with_what_cuda_said(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int64)
    for status, message in [(-719, "CUDA error 719 from the launch"), (2, r"refused its arguments \(status 2\)")]:
        monkeypatch.setattr(Extension, "_launch", lambda self, name, arguments, status=status: status)
        with pytest.raises(RuntimeError, match=rf"cuda_topk_logprobs:? {message}"):
            cuda.topk_logprobs(logits, 1, 1.0)
        with pytest.raises(RuntimeError, match=rf"cuda_gather_logprobs:? {message}"):
            cuda.gather_logprobs(logits, ids, 1.0)


@pytest.mark.parametrize("k", [0, 9, -1])
def test_k_out_of_range_is_refused(extension: Extension, k: int) -> None:
    with pytest.raises(ValueError, match=rf"k: got {k}, expected 1\.\.8 on the cuda backend \(V = 8\)"):
        cuda.topk_logprobs(torch.zeros(1, 8), k, 1.0)
    with pytest.raises(ValueError, match=r"k: got 1025, expected 1\.\.1024"):
        cuda.topk_logprobs(torch.zeros(1, 2000), 1025, 1.0)


def test_limits_are_those_of_the_sources() -> None:
    sources = "".join(path.read_text() for path in sorted((host.CSRC / "cuda").glob("*.cu*")))
    assert f"kMaxK = {cuda.MAX_K};" in sources
    assert "kMaxVocab = 1 << 30;" in sources
    assert cuda.MAX_VOCAB == 1 << 30


@pytest.mark.skipif(native._C is None or not native._C.cuda, reason="built without CUDA kernels")
def test_bindings_have_the_parameters_of_the_headers_in_their_order() -> None:
    for name in ("cuda_topk_logprobs", "cuda_gather_logprobs", "cuda_topk_parts", "cuda_topk_scratch_bytes"):
        signature = getattr(native._C, name).__doc__.splitlines()[0]
        assert re.findall(r"(\w+): ", signature) == parameters_of(name)
        stub = (Path(cuda.__file__).parents[1] / "_C.pyi").read_text()
        declared = re.search(rf"^def {name}\(([^)]*)\)", stub, re.M)
        assert declared is not None
        assert re.findall(r"(\w+): ", declared[1]) == parameters_of(name)
