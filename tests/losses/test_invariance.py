"""What must not change a loss or its gradient: chunks, micro-batches, packing, pads, the order of a support."""

import math
from typing import Any

import pytest
import torch
from each_backend import Backend
from scenes import scene, support, with_pads
from torch import Tensor

from asyncopd import Correction, Support, forward_kl, linear_forward_kl, linear_reverse_kl, reverse_kl
from asyncopd.backends.reference import rows

LINEAR = ("linear_gather_logprobs", "linear_gather_logprobs_backward", "linear_gather_logits",
          "linear_gather_logits_backward", "linear_logsumexp")  # fmt: skip
N, V, H = 13, 29, 4
LOSSES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "reverse": (linear_reverse_kl, "head_tail", {}),
    "reverse_mean": (linear_reverse_kl, "head_tail", {"baseline": "mean"}),
    "reverse_loo": (linear_reverse_kl, "head_tail", {"baseline": "loo"}),
    "reverse_sampled": (linear_reverse_kl, "head_tail", {"normalize": "sampled"}),
    "reverse_bucket": (linear_reverse_kl, "student_top_k", {"tail": "bucket"}),
    "reverse_renormalize": (linear_reverse_kl, "student_top_k", {"tail": "renormalize"}),
    "reverse_clip": (linear_reverse_kl, "samples", {"correction": Correction(clip_eps=0.2)}),
    "reverse_m2po": (linear_reverse_kl, "samples", {"correction": Correction(m2_budget=0.04)}),
    "reverse_behaviour": (linear_reverse_kl, "samples", {"correction": Correction(advantage="behavior")}),
    "forward": (linear_forward_kl, "teacher_samples", {}),
    "forward_bucket": (linear_forward_kl, "teacher_top_k", {"tail": "bucket"}),
    "forward_renormalize": (linear_forward_kl, "teacher_top_k", {"tail": "renormalize"}),
}
pytestmark = pytest.mark.ops("kl_rows", *LINEAR)


class Problem:
    """A head, a support of it and a mask; `run` gives the loss and the gradients of hidden, weight and bias."""

    def __init__(self, backend: Backend, rng: torch.Generator, name: str) -> None:
        self.loss, draw, self.options = LOSSES[name]
        shapes = ((N, H), (V, H), (V,))
        self.hidden, self.weight, self.bias = (
            backend.tensor(torch.randn(*shape, generator=rng, dtype=torch.float64)) for shape in shapes
        )
        sup = support(scene(rng, rows=N, vocab=V), draw, rng)
        self.support = Support(sup.ids, backend.tensor(sup.teacher_logprobs), backend.tensor(sup.log_weights), sup.draw)
        self.mask = torch.rand(N, generator=rng) < 0.7

    def run(
        self, rows: Any = slice(None), sup: Support | None = None, mask: Tensor | None = None, **options: Any
    ) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (self.hidden, self.weight, self.bias)]
        loss = self.loss(
            leaves[0][rows],
            leaves[1],
            (self.support if sup is None else sup)[rows],
            bias=leaves[2],
            mask=(self.mask if mask is None else mask)[rows],
            temperature=0.9,
            **{**self.options, **options},
        )
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def same(backend: Backend, actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        backend.close(a, b.double())


@pytest.fixture(params=LOSSES)
def problem(request: pytest.FixtureRequest, backend: Backend, rng: torch.Generator) -> Problem:
    return Problem(backend, rng, request.param)


@pytest.mark.parametrize("tile", [1, 70, 100_000])
def test_chunk_size(backend: Backend, problem: Problem, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    whole = problem.run()
    monkeypatch.setattr(rows, "TILE_ELEMENTS", tile)
    same(backend, problem.run(), whole)


# M2PO's second moment is a budget of the whole batch.
@pytest.mark.parametrize("problem", [name for name in LOSSES if name != "reverse_m2po"], indirect=True)
@pytest.mark.parametrize("split", [[1, 12], [4, 4, 5], [1] * 13])
def test_micro_batches_with_the_number_of_items_add_up(backend: Backend, problem: Problem, split: list[int]) -> None:
    whole = problem.run()
    items = int(problem.mask.sum())
    total = [torch.zeros_like(t) for t in whole]
    start = 0
    for size in split:
        part = problem.run(slice(start, start + size), num_items_in_batch=items)
        total = [a + b for a, b in zip(total, part, strict=True)]
        start += size
    same(backend, total, whole)


@pytest.mark.parametrize("columns", [[0], [2, 4], [0, 3, 6, 6]])
def test_pads_in_the_support(backend: Backend, problem: Problem, columns: list[int]) -> None:
    columns = [min(c, problem.support.ids.shape[1]) for c in columns]
    same(backend, problem.run(sup=with_pads(problem.support, columns)), problem.run())


def test_what_a_pad_holds(backend: Backend, problem: Problem) -> None:
    padded = with_pads(problem.support, [0, 3])
    junk = Support(
        padded.ids,
        padded.teacher_logprobs.masked_fill(padded.ids < 0, float("nan")),
        padded.log_weights.masked_fill(padded.ids < 0, 30.0),
        padded.draw,
    )
    same(backend, problem.run(sup=junk), problem.run())


def test_order_of_the_entries(backend: Backend, problem: Problem, rng: torch.Generator) -> None:
    sup = problem.support
    order = torch.stack([torch.randperm(sup.ids.shape[1], generator=rng) for _ in range(N)])
    pieces = (sup.ids, sup.teacher_logprobs, sup.log_weights)
    ids, teacher, weights = (t.gather(1, order) for t in pieces)
    shuffled = Support(ids, teacher, weights, sup.draw)
    same(backend, problem.run(sup=shuffled), problem.run())


def test_id_dtype(backend: Backend, problem: Problem) -> None:
    sup = problem.support
    narrow = Support(sup.ids.int(), sup.teacher_logprobs, sup.log_weights, sup.draw)
    same(backend, problem.run(sup=narrow), problem.run())


def test_packing(backend: Backend, problem: Problem) -> None:
    """Rows that do not count are as good as absent, and what they hold does not matter."""
    whole = problem.run()
    packed = problem.run(rows=problem.mask.nonzero()[:, 0])
    same(backend, packed, whole)
    problem.hidden[~problem.mask] = float("nan")
    sup = problem.support
    junk = Support(
        sup.ids,
        sup.teacher_logprobs.masked_fill(~problem.mask[:, None], float("nan")),
        sup.log_weights.masked_fill(~problem.mask[:, None], float("nan")),
        sup.draw,
    )
    same(backend, problem.run(sup=junk), whole)


def test_order_of_the_rows(backend: Backend, problem: Problem, rng: torch.Generator) -> None:
    same(backend, problem.run(rows=torch.randperm(N, generator=rng)), problem.run())


@pytest.mark.parametrize("loss", [reverse_kl, forward_kl])
def test_a_duplicated_id_is_two_terms(backend: Backend, rng: torch.Generator, loss: Any) -> None:
    """One entry of weight w is two entries of weight w / 2; a set in place of a list would halve it."""
    s = scene(rng)
    ids = torch.tensor([[4, 7, 2]]).expand(5, 3)
    log_w = torch.full((5, 3), 0.4, dtype=torch.float64)
    twice_ids = torch.cat([ids, ids[:, :1]], 1)
    twice_w = torch.cat([log_w, log_w[:, :1]], 1)
    twice_w[:, [0, 3]] -= math.log(2)
    results = []
    for columns, weights in ((ids, log_w), (twice_ids, twice_w)):
        teacher = backend.tensor(s.log_q.gather(1, columns))
        student = backend.tensor(s.log_p).requires_grad_()
        value = loss(student.gather(1, columns), Support(columns, teacher, backend.tensor(weights)), reduction="sum")
        value.backward()
        assert student.grad is not None
        results.append((value.detach(), student.grad))
    for once, twice in zip(*results, strict=True):
        backend.close(twice, once.double())


@pytest.mark.parametrize("loss", [linear_reverse_kl, linear_forward_kl])
@pytest.mark.parametrize("normalize", ["exact", "sampled"])
def test_duplicated_ids_through_the_head(backend: Backend, rng: torch.Generator, loss: Any, normalize: str) -> None:
    options: dict[str, Any] = {"normalize": normalize} if loss is linear_reverse_kl else {}
    s = scene(rng, rows=3, vocab=V)
    ids = torch.tensor([[4, 7, 4, 4], [1, 1, 1, 1], [0, 28, 28, 0]])
    log_w = -math.log(4) - s.log_mu.gather(1, ids)
    sup = Support(ids, backend.tensor(s.log_q.gather(1, ids)), backend.tensor(log_w), "samples")
    weight = backend.tensor(torch.randn(V, H, generator=rng, dtype=torch.float64)).requires_grad_()
    hidden = backend.tensor(torch.randn(3, H, generator=rng, dtype=torch.float64))
    loss(hidden, weight, sup, **options).backward()
    dense = weight.detach().double().requires_grad_()
    z = hidden.double() @ dense.t()
    at_ids = z.gather(1, ids) if normalize == "sampled" and options else z.log_softmax(1).gather(1, ids)
    plain = reverse_kl if loss is linear_reverse_kl else forward_kl
    wide = Support(ids, sup.teacher_logprobs.double(), sup.log_weights.double(), "samples")
    plain(at_ids, wide, **options).backward()
    assert weight.grad is not None
    assert dense.grad is not None
    backend.close(weight.grad, dense.grad)
