"""Tensors that an eager call must not hand to a kernel, or that autograd saves in another way than most.

The ops run their backend directly in an eager call (asyncopd/ops/eager.py), so what the dispatcher would have done for
such tensors is done there.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import asyncopd
from asyncopd import Support
from asyncopd.ops import eager

N, V, K, H = 6, 30, 4, 8
Loss = Callable[[Tensor, Tensor, Support], Tensor]

LOSSES: dict[str, Loss] = {
    "gather": lambda x, w, s: asyncopd.gather_logprobs(x @ w.T, s.ids).sum(),
    "kl": lambda x, w, s: asyncopd.reverse_kl(asyncopd.gather_logprobs(x @ w.T, s.ids), s),
    "kl rows": lambda x, w, s: asyncopd.reverse_kl(asyncopd.gather_logprobs(x @ w.T, s.ids), s, reduction="none").sum(),
    "linear gather": lambda x, w, s: asyncopd.linear_gather_logprobs(x, w, s.ids).sum(),
    "exact": lambda x, w, s: asyncopd.linear_reverse_kl(x, w, s),
    "sampled": lambda x, w, s: asyncopd.linear_reverse_kl(x, w, s, normalize="sampled"),
}


def problem(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, H, generator=rng).requires_grad_()
    weight = torch.randn(V, H, generator=rng).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N, K), generator=rng)


def support_of(ids: Tensor) -> Support:
    return Support(ids.clone(), torch.full((N, K), -2.0), torch.full((N, K), 1.0), "samples")


@pytest.mark.ops("gather_logprobs", "linear_gather_logprobs", "kl_loss", "linear_kl", "linear_gather_logits")
@pytest.mark.parametrize("name", LOSSES)
def test_supports_made_under_inference_mode(engine: str, rng: torch.Generator, name: str) -> None:
    hidden, weight, ids = problem(rng)
    with torch.inference_mode():
        teacher = support_of(ids)
    assert teacher.teacher_logprobs.is_inference()
    wanted = torch.autograd.grad(LOSSES[name](hidden, weight, support_of(ids)), (hidden, weight))
    loss = LOSSES[name](hidden, weight, teacher)
    # Twice: the second backward reads the inputs again.
    for _ in range(2):
        found = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.ops("gather_logprobs", "kl_rows")
def test_batched_gradients_take_the_ops(engine: str, rng: torch.Generator) -> None:
    """The older vmap is no functorch level: its tensors have no address."""
    hidden, weight, ids = problem(rng)
    support = support_of(ids)

    def rows(x: Tensor) -> Tensor:
        return asyncopd.reverse_kl(asyncopd.gather_logprobs(x @ weight.detach().T, ids), support, reduction="none")

    one_by_one = torch.autograd.functional.jacobian(rows, hidden.detach())
    batched = torch.autograd.functional.jacobian(rows, hidden.detach(), vectorize=True)
    torch.testing.assert_close(batched, one_by_one)


@pytest.mark.ops("kl_loss")
def test_a_denominator_that_changes_is_seen(engine: str) -> None:
    scores = torch.full((N, K), -1.5, requires_grad=True)
    items = torch.tensor(4.0)
    loss = asyncopd.reverse_kl(scores, support_of(torch.zeros(N, K, dtype=torch.int64)), num_items_in_batch=items)
    torch.autograd.grad(loss, scores, retain_graph=True)
    items.fill_(8.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, scores)


def zeros(x: Tensor) -> Tensor:
    return torch._efficientzerotensor(tuple(x.shape))


WITHOUT_DATA: dict[str, Callable[[Tensor], Any]] = {
    "zero tensor": zeros,
    "functional": torch._to_functional_tensor,
    "negated view": torch._neg_view,
}


@pytest.mark.parametrize("kind", WITHOUT_DATA)
def test_memory_that_does_not_hold_the_values_is_not_plain(kind: str) -> None:
    assert eager.plain(torch.ones(2, 3), torch.ones(0, 3), None)
    assert not eager.plain(WITHOUT_DATA[kind](torch.ones(2, 3)))


@pytest.mark.ops("topk_logprobs")
def test_a_negated_view_is_read_with_its_sign(engine: str, rng: torch.Generator) -> None:
    logits = torch.randn(N, V, generator=rng)
    for found, wanted in zip(
        asyncopd.topk_logprobs(torch._neg_view(-logits), 3), asyncopd.topk_logprobs(logits, 3), strict=True
    ):
        assert torch.equal(found, wanted)


def test_a_torch_without_the_private_names_takes_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_CAN_TELL", False)
    assert not eager.plain(torch.ones(2, 3))
    assert asyncopd.topk_logprobs(torch.ones(2, 3), 1).ids.tolist() == [[0], [0]]


@pytest.mark.host_only
@pytest.mark.ops("gather_logprobs", "linear_gather_logprobs", "linear_gather_logits", "linear_kl")
@pytest.mark.parametrize("name", LOSSES)
def test_ids_beyond_the_vocabulary_are_named(engine: str, rng: torch.Generator, name: str) -> None:
    hidden, weight, ids = problem(rng)
    ids[2, 1] = V
    with pytest.raises(ValueError, match=rf"ids: got values from -?\d+ to {V}, expected -1 \(pad\) or 0..{V - 1}"):
        LOSSES[name](hidden, weight, support_of(ids))


def test_a_head_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="lm_head_weight: got shape \\[0, 8\\], expected at least one row"):
        asyncopd.linear_topk_logprobs(torch.ones(2, H), torch.ones(0, H), 1)


def test_a_float_denominator_that_changes_costs_no_new_graph() -> None:
    scores = torch.full((N, K), -1.5, requires_grad=True)
    support = support_of(torch.zeros(N, K, dtype=torch.int64))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    step = torch.compile(
        lambda items: asyncopd.reverse_kl(scores, support, num_items_in_batch=items),
        backend="aot_eager",
        fullgraph=True,
    )
    for index in range(12):
        torch.testing.assert_close(
            step(10.5 + index), asyncopd.reverse_kl(scores, support, num_items_in_batch=10.5 + index)
        )
    assert counters["stats"]["unique_graphs"] <= 3
    torch._dynamo.reset()
