"""The gradient of each loss: the true derivative where the design says so, else the score-function form."""

from typing import Any

import pytest
import torch
from each_backend import Backend, label
from oracle import Options, dz_of, forward_row, reverse_row, rows_of
from scenes import DRAWS, Scene, full_support, on, scene, support
from torch import Tensor

from asyncopd import (
    Support,
    forward_kl,
    gather_logprobs,
    linear_forward_kl,
    linear_gather_logprobs,
    linear_reverse_kl,
    reverse_kl,
)

TRUE_DERIVATIVES: list[tuple[str, Any, dict[str, Any]]] = [
    ("full", reverse_kl, {}),
    ("full", reverse_kl, {"baseline": "mean"}),
    ("student_top_k", reverse_kl, {"tail": "bucket"}),
    ("teacher_top_k", reverse_kl, {"tail": "renormalize"}),
    ("samples", reverse_kl, {"normalize": "sampled"}),
    ("head_tail", reverse_kl, {"normalize": "sampled", "baseline": "mean"}),
    ("full", reverse_kl, {"normalize": "sampled"}),
    ("full", forward_kl, {}),
    ("samples", forward_kl, {}),
    ("teacher_samples", forward_kl, {}),
    ("head_tail", forward_kl, {}),
    ("teacher_top_k", forward_kl, {}),
    ("teacher_top_k", forward_kl, {"tail": "bucket"}),
    ("student_top_k", forward_kl, {"tail": "renormalize"}),
]


def of(s: Scene, draw: str, rng: torch.Generator) -> Support:
    return full_support(s.log_q) if draw == "full" else support(s, draw, rng, samples=4)


@pytest.mark.parametrize(("draw", "loss", "options"), TRUE_DERIVATIVES, ids=label)
def test_gradcheck_on_logits(rng: torch.Generator, draw: str, loss: Any, options: dict[str, Any]) -> None:
    s = scene(rng, rows=3, vocab=7)
    sup = of(s, draw, rng)
    mask = torch.tensor([True, False, True])

    def run(z: Tensor) -> Tensor:
        at_ids = z.gather(1, sup.ids) if "normalize" in options else gather_logprobs(z, sup.ids)
        return loss(at_ids, sup, mask=mask, reduction="none", **options)

    assert torch.autograd.gradcheck(run, (s.log_p + 0.3).requires_grad_())


@pytest.mark.parametrize(("draw", "loss", "options"), TRUE_DERIVATIVES, ids=label)
def test_gradcheck_through_the_head(rng: torch.Generator, draw: str, loss: Any, options: dict[str, Any]) -> None:
    s = scene(rng, rows=3, vocab=7)
    sup = of(s, draw, rng)
    linear = linear_reverse_kl if loss is reverse_kl else linear_forward_kl
    leaves = [torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((3, 2), (7, 2), (7,))]

    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        head: dict[str, Any] = {"temperature": 0.8, "logit_scale": 1.3, "softcap": 5.0}
        return linear(h, w, sup, bias=b, reduction="sum", **head, **options)

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in leaves))


# ------------------------------------------------------------------------- against the loops over single entries


@pytest.mark.ops("kl_rows")
@pytest.mark.parametrize("baseline", ["none", "mean", "loo"])
@pytest.mark.parametrize("normalize", ["exact", "sampled"])
@pytest.mark.parametrize("draw", DRAWS)
def test_reverse_kl_is_the_sum_over_its_entries(
    backend: Backend, rng: torch.Generator, draw: str, normalize: Any, baseline: Any
) -> None:
    s = scene(rng)
    # Not told how it was drawn: log-weight 0 marks the certain entries. A top-k is then all certain.
    sup = on(backend, support(s, draw, rng, told=False))
    student = backend.tensor(s.log_p + (1.0 if normalize == "sampled" else 0.0)).gather(1, sup.ids).requires_grad_()
    rows = reverse_kl(student, sup, normalize=normalize, baseline=baseline, reduction="none")
    rows.sum().backward()
    values, coef = rows_of(reverse_row, student.detach(), sup, Options(normalize, baseline=baseline))
    backend.close(rows.detach(), values)
    assert student.grad is not None
    backend.close(student.grad, coef)


@pytest.mark.ops("kl_rows")
@pytest.mark.parametrize("tail", ["drop", "bucket", "renormalize"])
@pytest.mark.parametrize("loss", ["reverse", "forward"])
@pytest.mark.parametrize("draw", ["teacher_top_k", "student_top_k"])
def test_truncated_losses_are_the_sum_over_their_entries(
    backend: Backend, rng: torch.Generator, draw: str, loss: str, tail: Any
) -> None:
    s = scene(rng)
    sup = on(backend, support(s, draw, rng))
    student = backend.tensor(s.log_p).gather(1, sup.ids).requires_grad_()
    rows = (reverse_kl if loss == "reverse" else forward_kl)(student, sup, tail=tail, reduction="none")
    rows.sum().backward()
    if loss == "reverse":
        values, coef = rows_of(reverse_row, student.detach(), sup, Options(tail=tail))
    else:
        values, coef = rows_of(forward_row, student.detach(), sup, tail)
    backend.close(rows.detach(), values)
    assert student.grad is not None
    backend.close(student.grad, coef)
    if tail != "drop":
        assert (values > 0).all()  # a divergence


@pytest.mark.ops("kl_rows", "linear_gather_logprobs", "linear_gather_logprobs_backward")
def test_drop_leaves_the_plus_one_out(backend: Backend, rng: torch.Generator) -> None:
    """dz = scatter(c) - (sum c) softmax with c = p A, and not the plain derivative's p (A + 1)."""
    s = scene(rng)
    sup = support(s, "student_top_k", rng)
    sup = Support(sup.ids, backend.tensor(sup.teacher_logprobs), backend.tensor(sup.log_weights), sup.draw)
    # An identity for hidden states makes the weight the logits, transposed.
    weight = backend.tensor(s.log_p.t()).contiguous().requires_grad_()
    linear_reverse_kl(backend.tensor(torch.eye(5)), weight, sup, reduction="sum").backward()
    log_p = weight.detach().double().t().log_softmax(1)
    at_ids = log_p.gather(1, sup.ids)
    signal = at_ids - sup.teacher_logprobs.double()
    assert weight.grad is not None
    backend.close(weight.grad.t(), dz_of(at_ids.exp() * signal, sup.ids, log_p))
    plain = dz_of(at_ids.exp() * (signal + 1), sup.ids, log_p)
    assert (weight.grad.t().double() - plain).abs().max() > 1e-2


def test_sampled_supports_leave_the_plus_one_out(rng: torch.Generator) -> None:
    s = scene(rng)
    sup = support(s, "samples", rng)
    logits = s.log_p.clone().requires_grad_()
    loss = reverse_kl(gather_logprobs(logits, sup.ids), sup, reduction="sum")
    (mine,) = torch.autograd.grad(loss, logits)
    at_ids = logits.log_softmax(1).gather(1, sup.ids)
    plain_loss = (sup.log_weights.exp() * at_ids.exp() * (at_ids - sup.teacher_logprobs)).sum()
    torch.testing.assert_close(loss, plain_loss)  # one value
    (plain,) = torch.autograd.grad(plain_loss, logits)
    weight = (sup.log_weights + at_ids.detach()).exp()
    torch.testing.assert_close(plain - mine, dz_of(weight, sup.ids, s.log_p))  # two gradients, one score apart
    assert (plain - mine).abs().max() > 1e-2


@pytest.mark.ops("kl_rows", "linear_gather_logprobs", "linear_gather_logprobs_backward")
@pytest.mark.parametrize("loss", [linear_reverse_kl, linear_forward_kl])
def test_upstream_gradients_of_single_rows_arrive(backend: Backend, rng: torch.Generator, loss: Any) -> None:
    s = scene(rng, rows=6)
    sup = support(s, "head_tail", rng)
    sup = Support(sup.ids, backend.tensor(sup.teacher_logprobs), backend.tensor(sup.log_weights), sup.draw)
    hidden = backend.tensor(torch.randn(6, 4, generator=rng, dtype=torch.float64)).requires_grad_()
    weight = backend.tensor(torch.randn(11, 4, generator=rng, dtype=torch.float64)).requires_grad_()
    upstream = backend.tensor(torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 1e-3], dtype=torch.float64))
    rows = loss(hidden, weight, sup, reduction="none")
    assert rows.shape == (6,)
    rows.backward(upstream)
    assert weight.grad is not None
    total = torch.zeros_like(weight, dtype=torch.float64)
    for n in range(6):
        one = weight.detach().requires_grad_()
        loss(hidden.detach()[n : n + 1], one, sup[n : n + 1], reduction="sum").backward()
        assert one.grad is not None
        total += upstream[n].double() * one.grad.double()
    backend.close(weight.grad, total)
    assert hidden.grad is not None
    assert (hidden.grad[2] == 0).all()


def test_a_second_loss_on_the_same_scores_adds_up(rng: torch.Generator) -> None:
    s = scene(rng)
    sup = support(s, "head_tail", rng)
    hidden, weight = torch.randn(5, 3, generator=rng).double(), torch.randn(11, 3, generator=rng).double()
    weight.requires_grad_()
    scores = linear_gather_logprobs(hidden, weight, sup.ids)
    (reverse_kl(scores, sup) + 0.5 * forward_kl(scores, sup)).backward()
    both = weight.grad
    expected = []
    for loss in (reverse_kl, forward_kl):
        leaf = weight.detach().requires_grad_()
        loss(linear_gather_logprobs(hidden, leaf, sup.ids), sup).backward()
        assert leaf.grad is not None
        expected.append(leaf.grad)
    torch.testing.assert_close(both, expected[0] + 0.5 * expected[1])
