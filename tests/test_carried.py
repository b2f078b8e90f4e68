"""Carrying arguments to a device and back, with the CPU as the device."""

import pytest
import torch
from carried import carried, carry, install

import asyncopd
from asyncopd import backends
from asyncopd.backends.reference.head import Head


def test_a_copy_lies_in_memory_as_the_tensor_does() -> None:
    whole = torch.arange(60.0).view(6, 10)
    for view in (whole, whole[1:, 3:7], whole.t(), whole[:1].expand(4, 10), whole[2:2], torch.tensor(3.0)):
        copy = carry(view, "cpu")
        assert torch.equal(copy, view)
        assert (copy.stride(), copy.storage_offset()) == (view.stride(), view.storage_offset())
        assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()


def test_what_an_op_writes_comes_back() -> None:
    def add_into(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out += x
        return out.sum()

    out = torch.ones(4, 6)[:, ::2]
    assert carried(add_into, "cpu")(out, torch.ones(3)) == 24
    assert (out == 2).all()


def test_what_an_op_must_not_write_shows() -> None:
    def spoil(x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)

    with pytest.raises(AssertionError, match="spoil changed one of its arguments"):
        carried(spoil, "cpu")(torch.ones(3))
    nothing = torch.tensor([float("nan"), -0.0])
    assert torch.equal(carried(torch.isnan, "cpu")(nothing.expand(2, 2)), torch.tensor([[True, False]] * 2))


def test_the_tensors_of_a_head_are_carried() -> None:
    head = Head(torch.ones(4, 3), None, 0.5, 2.0, None)

    def look(given: Head) -> torch.Tensor:
        assert given.weight.data_ptr() != head.weight.data_ptr()
        assert (given.bias, given.temperature, given.logit_scale, given.softcap) == (None, 0.5, 2.0, None)
        return given.weight.sum()

    def spoil(given: Head) -> None:
        given.weight.zero_()

    assert carried(look, "cpu")(head) == 12
    with pytest.raises(AssertionError, match="spoil changed one of its arguments"):
        carried(spoil, "cpu")(head)


def test_every_call_of_a_backend_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = backends.module("reference").topk_logprobs

    def watched(logits: torch.Tensor, k: int, temperature: float) -> object:
        seen.append(logits.data_ptr())
        return real(logits, k, temperature)

    monkeypatch.setattr(backends.module("reference"), "topk_logprobs", watched)
    monkeypatch.setenv("ASYNCOPD_BACKEND", "cpu")  # which the carried one takes the place of
    install(monkeypatch, "reference", "cpu")
    logits = torch.randn(3, 7)
    ids = asyncopd.topk_logprobs(logits, 2).ids
    assert torch.equal(ids, logits.topk(2).indices)
    assert len(seen) == 1
    assert seen[0] != logits.data_ptr()
