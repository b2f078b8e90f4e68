"""Every op in a CUDA graph, on a side stream and on another device; without a GPU, that no op waits for its data.

A graph is captured once and replayed with new inputs in the same memory: a step that synchronises breaks the capture,
and one that depends on the data or on where tensors lie breaks the replay.
"""

import os
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from each_backend import DEVICES
from test_opcheck import OPS, moved, op_cases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asyncopd import backends
from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference import rows, sample
from asyncopd.backends.reference.head import Head


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def other_values(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Other inputs of the same shapes: the rows in reverse, which are valid wherever they were."""
    return tuple(a.flip(0) if isinstance(a, Tensor) and a.dim() else a for a in args)


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def assert_equal(got: Any, expected: Any) -> None:
    for a, b in zip(outputs(got), outputs(expected), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------------ without a GPU


def call_backend(backend: str, name: str, args: tuple[Any, ...]) -> Any:
    """The backend's own function: the dispatcher would run an op's fake instead on tensors without data.

    It takes an op's arguments in their order, but those of a head and of a loss bundled, as the ops bundle them.
    """
    spec: tuple[LossSpec, ...] = ()
    if name in ("kl_rows", "kl_loss", "linear_kl"):
        args, spec = args[:-1], (LossSpec.parse(args[-1]),)
    schema = getattr(OPS, name).default._schema
    named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
    if "weight" in named:
        rest = {field.name: named.pop(field.name, None) for field in fields(Head)[1:]}
        named["weight"] = Head(named["weight"], **rest)
    return getattr(backends.module(backend), name)(*named.values(), *spec)


@pytest.mark.parametrize(("runner", "name", "args"), op_cases("reference"))
def test_what_a_device_would_be_asked_needs_no_data(runner: str, name: str, args: tuple[Any, ...]) -> None:
    """Meta tensors have shapes and nothing else: whatever reads a value or a count of values raises."""
    expected = call_backend(runner, name, args)
    got = call_backend(runner, name, moved(args, "meta"))
    for a, b in zip(outputs(got), outputs(expected), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


class NothingReadBack(TorchDispatchMode):
    """Raises where a tensor's value, or how many of its values are so and so, is asked for."""

    REFUSED = frozenset({"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert name not in self.REFUSED, f"{func.name()} waits for the device"
        assert not by_mask, f"{func.name()} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_guard_sees_what_waits() -> None:
    x = torch.arange(4.0)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 1], lambda: bool(x[0]), lambda: int(x[1])):
        with pytest.raises(AssertionError, match="waits for the device"), NothingReadBack():
            wait()


@pytest.mark.parametrize(("runner", "name", "args"), op_cases("triton"))
@pytest.mark.skipif(DEVICES["triton"] != "cpu", reason="on a GPU a capture says more")
def test_triton_launchers_wait_for_nothing(
    runner: str, name: str, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncopd import kernels

    # Ids and weights are read to be refused on a CPU, which the interpreter's tensors are on, and nowhere else.
    for module in vars(kernels).values():
        for check in ("check_ids_in_range", "check_possible", "check_weights"):
            if hasattr(module, check):
                monkeypatch.setattr(module, check, lambda *_, **__: None)
    with NothingReadBack():
        call_backend(runner, name, args)


def test_ids_are_read_on_a_cpu_only() -> None:
    ids, logits = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 5)
    for check, args in ((rows.check_ids_in_range, (ids, 5)), (sample.check_possible, (logits, ids))):
        with pytest.raises(AssertionError, match="waits"), NothingReadBack():
            check(*args)
        check(*moved(args, "meta"))


# --------------------------------------------------------------------------------------------------------- on a GPU

GPU = op_cases(*(name for name in ("triton", "cuda") if DEVICES[name] == "cuda"))


@pytest.fixture
def forced(runner: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ops run on the backend of the case; what is queued when a test begins and ends is done."""
    monkeypatch.setenv("ASYNCOPD_BACKEND", runner)
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif("PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ, reason="a graph needs the caching allocator")
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("runner", "name", "args"), GPU)
def test_a_graph_replays_with_new_inputs(runner: str, name: str, args: tuple[Any, ...]) -> None:
    op, held, first = getattr(OPS, name), moved(args, "cuda"), moved(args, "cuda")
    second = other_values(first)
    expected = op(*first), op(*second)  # and all that is compiled or tuned, before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = op(*held)
    for values, wanted in zip((second, first), reversed(expected), strict=True):
        for place, value in zip(tensors_of(held), tensors_of(values), strict=True):
            place.copy_(value)
        for out in outputs(result):
            out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(result, wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("runner", "name", "args"), GPU)
def test_the_current_stream_is_the_one_that_is_used(runner: str, name: str, args: tuple[Any, ...]) -> None:
    op, held = getattr(OPS, name), moved(args, "cuda")
    late = [value.clone() for value in tensors_of(other_values(held))]
    expected = op(*other_values(held))
    op(*held)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: whoever does not queue behind it sees the old values
        for place, value in zip(tensors_of(held), late, strict=True):
            place.copy_(value)
        result = op(*held)
    stream.synchronize()
    assert_equal(result, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("forced")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none")
@pytest.mark.parametrize(("runner", "name", "args"), GPU)
def test_a_device_that_is_not_the_current_one(runner: str, name: str, args: tuple[Any, ...]) -> None:
    op = getattr(OPS, name)
    expected = op(*moved(args, "cuda:0"))
    with torch.cuda.device(0):
        result = op(*moved(args, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(out.device.index == 1 for out in outputs(result))
    assert_equal(result, expected)
