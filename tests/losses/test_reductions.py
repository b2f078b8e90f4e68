"""Reductions, masks and denominators; no valid row gives loss 0 and zero gradients."""

from typing import Any

import pytest
import torch
from each_backend import Backend, label
from scenes import scene, support
from torch import Tensor

from asyncopd import Support, forward_kl, linear_forward_kl, linear_reverse_kl, reverse_kl

LINEAR = ("linear_gather_logprobs", "linear_gather_logprobs_backward", "linear_gather_logits",
          "linear_gather_logits_backward", "linear_logsumexp")  # fmt: skip
pytestmark = pytest.mark.ops("kl_rows", *LINEAR)
MASK = torch.tensor([True, False, True, True, False])


def inputs(backend: Backend, rng: torch.Generator) -> tuple[Tensor, Support]:
    s = scene(rng)
    sup = support(s, "head_tail", rng)
    sup = Support(sup.ids, backend.tensor(sup.teacher_logprobs), backend.tensor(sup.log_weights), sup.draw)
    return backend.tensor(s.log_p).gather(1, sup.ids).requires_grad_(), sup


@pytest.mark.parametrize("loss", [reverse_kl, forward_kl])
def test_reductions(backend: Backend, rng: torch.Generator, loss: Any) -> None:
    student, sup = inputs(backend, rng)
    each = loss(student, sup, reduction="none").double()
    assert each.shape == (5,)
    backend.close(loss(student, sup), each.mean())
    backend.close(loss(student, sup, reduction="mean"), each.mean())
    backend.close(loss(student, sup, reduction="sum"), each.sum())
    kept = each[MASK]
    backend.close(loss(student, sup, mask=MASK), kept.mean())
    backend.close(loss(student, sup, mask=MASK, reduction="sum"), kept.sum())
    backend.close(loss(student, sup, mask=MASK, reduction="none"), each.detach() * MASK)
    for items in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        for reduction in ("mean", "sum"):
            got = loss(student, sup, mask=MASK, num_items_in_batch=items, reduction=reduction)
            assert got.shape == ()
            backend.close(got, kept.sum() / 7)


@pytest.mark.parametrize("loss", [reverse_kl, forward_kl])
def test_gradients_have_the_same_denominator(backend: Backend, rng: torch.Generator, loss: Any) -> None:
    student, sup = inputs(backend, rng)

    def gradient(**options: Any) -> Tensor:
        return torch.autograd.grad(loss(student, sup, mask=MASK, **options), student)[0]

    total = gradient(reduction="sum").double()
    assert total.abs().max() > 0
    assert (total[~MASK] == 0).all()
    backend.close(gradient(), total / 3)
    backend.close(gradient(num_items_in_batch=11), total / 11)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_is_bool_or_0_and_1(backend: Backend, rng: torch.Generator, kind: torch.dtype) -> None:
    student, sup = inputs(backend, rng)
    assert torch.equal(reverse_kl(student, sup, mask=MASK.to(kind)), reverse_kl(student, sup, mask=MASK))


CALLS: list[tuple[Any, dict[str, Any]]] = [
    (linear_reverse_kl, {}),
    (linear_reverse_kl, {"baseline": "mean"}),
    (linear_reverse_kl, {"baseline": "loo"}),
    (linear_reverse_kl, {"normalize": "sampled"}),
    (linear_forward_kl, {}),
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("hidden_value", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("loss", "options"), CALLS, ids=label)
def test_no_valid_row(
    backend: Backend, rng: torch.Generator, loss: Any, options: dict[str, Any], hidden_value: float, reduction: str
) -> None:
    _, sup = inputs(backend, rng)
    hidden = backend.tensor(torch.full((5, 3), hidden_value)).requires_grad_()
    weight = backend.tensor(torch.randn(11, 3, generator=rng)).requires_grad_()
    bias = backend.tensor(torch.zeros(11)).requires_grad_()
    mask = torch.zeros(5, dtype=torch.bool)
    value = loss(hidden, weight, sup, bias=bias, mask=mask, reduction=reduction, **options)
    value.sum().backward()
    assert (value == 0).all()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize(("loss", "options"), CALLS, ids=label)
def test_no_row_at_all(backend: Backend, loss: Any, options: dict[str, Any]) -> None:
    hidden = backend.tensor(torch.zeros(0, 3)).requires_grad_()
    weight = backend.tensor(torch.ones(11, 3)).requires_grad_()
    empty = backend.tensor(torch.zeros(0, 4))
    value = loss(hidden, weight, Support(torch.zeros(0, 4, dtype=torch.int64), empty, empty), **options)
    value.backward()
    assert value == 0
    assert weight.grad is not None
    assert (weight.grad == 0).all()


@pytest.mark.parametrize(("loss", "options"), [*CALLS, (linear_forward_kl, {"tail": "bucket"}),
                                               (linear_reverse_kl, {"tail": "renormalize"}),
                                               (linear_reverse_kl, {"tail": "bucket"})], ids=label)  # fmt: skip
@pytest.mark.parametrize("k", [0, 3])
def test_rows_of_nothing_but_pads(backend: Backend, loss: Any, options: dict[str, Any], k: int) -> None:
    hidden = backend.tensor(torch.ones(2, 3)).requires_grad_()
    weight = backend.tensor(torch.ones(11, 3)).requires_grad_()
    pads = backend.tensor(torch.full((2, k), -torch.inf))
    value = loss(hidden, weight, Support(torch.full((2, k), -1), pads, pads), **options)
    value.backward()
    assert value == 0
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masked_rows_may_hold_anything(backend: Backend, rng: torch.Generator, reduction: Any, value: float) -> None:
    student, sup = inputs(backend, rng)
    clean = reverse_kl(student, sup, mask=MASK, reduction=reduction)
    (expected,) = torch.autograd.grad(clean.sum(), student)
    spoilt = torch.where(MASK[:, None], student.detach(), value).requires_grad_()
    teacher = torch.where(MASK[:, None], sup.teacher_logprobs, value)
    got = reverse_kl(spoilt, Support(sup.ids, teacher, sup.log_weights, sup.draw), mask=MASK, reduction=reduction)
    assert torch.equal(got, clean)
    assert torch.equal(torch.autograd.grad(got.sum(), spoilt)[0], expected)


def test_rows_of_pads_count_in_the_mean_as_any_other(backend: Backend, rng: torch.Generator) -> None:
    student, sup = inputs(backend, rng)
    ids = sup.ids.clone()
    ids[1] = -1
    each = reverse_kl(student, sup, reduction="none").double()
    got = reverse_kl(student, Support(ids, sup.teacher_logprobs, sup.log_weights, sup.draw))
    backend.close(got, each[[0, 2, 3, 4]].sum() / 5)
