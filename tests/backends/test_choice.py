"""Which backend runs an op: by device and dtype, by force, and never another one in silence."""

import warnings

import pytest
import torch

from asyncopd import backends, gather_logprobs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASYNCOPD_BACKEND", raising=False)
    backends._warn_once.cache_clear()


def test_native_kernels_run_where_there_are_some_and_the_reference_elsewhere() -> None:
    assert backends.choose("gather_logprobs", CPU, torch.float32) == "cpu"
    assert backends.choose("op_without_a_kernel", CPU, torch.float32) == "reference"
    assert backends.choose("gather_logprobs", CUDA, torch.bfloat16) == "reference"  # until it has run on a device


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
