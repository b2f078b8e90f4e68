"""Which backend runs an op: by device and dtype, by force, and never another one in silence."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from asyncopd import backends, gather_logprobs
from asyncopd.backends import reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASYNCOPD_BACKEND", raising=False)
    backends._warn_once.cache_clear()


def test_native_kernels_run_where_there_are_some_and_the_reference_elsewhere() -> None:
    assert backends.choose("gather_logprobs", CPU, torch.float32) == "cpu"
    assert backends.choose("op_without_a_kernel", CPU, torch.float32) == "reference"


def test_triton_runs_on_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not `cuda`, which is there to be asked for."""
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: None)
    monkeypatch.setattr(backends, "_DEVICE", {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"})
    ops = [op for op in reference.__all__ if backends.has_op("triton", op)]
    assert {"topk_logprobs", "sample_support", "gather_logprobs", "kl_loss", "kl_rows", "linear_kl"} <= set(ops)
    for op in ops:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert backends.choose(op, CUDA, dtype) == "triton"
            assert backends.choose(op, CPU, dtype) == "cpu"
        assert backends.choose(op, CUDA, torch.float64) == "reference"


def test_every_op_of_the_reference_is_on_every_device() -> None:
    """A choice by op would send the parts of one loss to different backends."""
    for name in ("cpu", "triton"):
        assert [op for op in reference.__all__ if not backends.has_op(name, op)] == []


def test_the_interpreter_is_no_substitute_for_the_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_DEVICE", {"cpu": "cpu", "triton": "cpu", "cuda": "cuda"})
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: None)
    assert backends.choose("gather_logprobs", CPU, torch.float32) == "cpu"


NO_TRITON = """
import sys, warnings
sys.modules["triton"] = None  # as if it were not installed
import torch
from asyncopd import backends
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for op in ("topk_logprobs", "kl_loss", "linear_kl"):
        for dtype in (torch.float32, torch.bfloat16):
            assert backends.choose(op, torch.device("cuda"), dtype) == "reference"
            assert backends.select(op, torch.device("cuda"), dtype) is getattr(backends.module("reference"), op)
assert len(caught) == 1, [str(w.message) for w in caught]
print(caught[0].message)
"""


def test_without_triton_cuda_tensors_run_the_reference_and_one_warning_names_the_package() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("ASYNCOPD_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, "-c", NO_TRITON], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "'triton' cannot run (triton is not installed (pip install 'asyncopd[triton]'))" in done.stdout


def test_a_selection_follows_the_environment_and_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, plain = backends.module("cpu"), backends.module("reference")
    assert backends.select("gather_logprobs", CPU, torch.float32) is cpu.gather_logprobs
    monkeypatch.setenv("ASYNCOPD_BACKEND", "reference")
    assert backends.select("gather_logprobs", CPU, torch.float32) is plain.gather_logprobs
    monkeypatch.delenv("ASYNCOPD_BACKEND")
    assert backends.select("gather_logprobs", CPU, torch.float64) is plain.gather_logprobs
    assert backends.select("gather_logprobs", CPU, torch.float32) is cpu.gather_logprobs
    seen = []
    monkeypatch.setattr(cpu, "gather_logprobs", lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled):
            backends.select("gather_logprobs", CPU, torch.float32)()
    assert seen == [False, False]
    monkeypatch.setattr(backends, "choose", lambda *_: "reference")
    assert backends.select("gather_logprobs", CPU, torch.float32) is plain.gather_logprobs


def test_a_choice_that_failed_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCOPD_BACKEND", "cpu")
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: "it was not built")
    for _ in range(2):
        with pytest.raises(backends.BackendUnavailable, match="it was not built"):
            backends.select("gather_logprobs", CPU, torch.float32)


def test_fp64_always_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCOPD_BACKEND", "cpu")
    assert backends.choose("gather_logprobs", CPU, torch.float64) == "reference"


def test_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCOPD_BACKEND", "cpu")
    with pytest.raises(backends.BackendUnavailable, match="has no 'op_without_a_kernel'"):
        backends.choose("op_without_a_kernel", CPU, torch.float32)
    with pytest.raises(backends.BackendUnavailable, match="on cuda tensors"):
        backends.choose("gather_logprobs", CUDA, torch.float32)
    monkeypatch.setenv("ASYNCOPD_BACKEND", "triton")
    with pytest.raises(backends.BackendUnavailable, match="ASYNCOPD_BACKEND=triton cannot run"):
        backends.choose("gather_logprobs", CPU, torch.float32)
    monkeypatch.setenv("ASYNCOPD_BACKEND", "fast")
    with pytest.raises(ValueError, match="got 'fast', expected one of reference, cpu, triton, cuda"):
        backends.choose("gather_logprobs", CPU, torch.float32)


def test_missing_extension_is_said_once_and_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: "it was not built")
    logits, ids = torch.randn(2, 5), torch.tensor([[1], [2]])
    with pytest.warns(UserWarning, match="'cpu' cannot run .it was not built.; the reference runs instead"):
        first = gather_logprobs(logits, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gather_logprobs(logits, ids), first)
    torch.testing.assert_close(first, logits.log_softmax(1).gather(1, ids))
