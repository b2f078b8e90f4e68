"""Everybody who is compared does the same work, and the check would say so if they did not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_cases import CPU, tiny
from torch import Tensor

from bench.families import COMPILED, FAMILIES, LIMIT, OURS, Provider, Wrong
from bench.families.extraction import Drawn
from bench.families.gather import Gathered
from bench.families.kl import Loss
from bench.run import prepare

HEADS = ("exact_head", "exact_head_zero_sum", "sampled_head")
LOGITS = ("topk", "support", "gather")
SCORES = ("linear_topk", "linear_gather")
PRODUCTS = (*HEADS, "exact_head_frozen", *SCORES)


def every_provider(families: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(family, p, id=f"{family}: {p.name}", marks=pytest.mark.slow if p.name == COMPILED else ())
        for family in families
        for p in FAMILIES[family].providers
    ]


def run(family: str, provider: Provider, dtype: torch.dtype, masked: float) -> float | None:
    inputs = FAMILIES[family].inputs(tiny(family, dtype, masked), CPU)
    done = prepare(provider, inputs, FAMILIES[family].oracle(inputs))
    assert done.status == "ok", done.reason
    return done.error


@pytest.mark.parametrize(("family", "provider"), every_provider(tuple(FAMILIES)))
def test_agrees_with_fp64(family: str, provider: Provider) -> None:
    error = run(family, provider, torch.float32, 0.0)
    assert (error is None) == (provider.name == LIMIT)
    assert error is None or error < 2e-5


@pytest.mark.parametrize(("family", "provider"), [p for p in every_provider(HEADS) if p.values[1].name != COMPILED])
def test_heads_agree_where_a_third_of_the_rows_is_masked(family: str, provider: Provider) -> None:
    error = run(family, provider, torch.float32, 1 / 3)
    assert error is None or error < 2e-5


@pytest.mark.parametrize(
    ("family", "provider"), [p for p in every_provider((*LOGITS, *PRODUCTS)) if p.values[1].name != COMPILED]
)
def test_bf16_within_its_rounding(family: str, provider: Provider) -> None:
    error = run(family, provider, torch.bfloat16, 0.0)
    # Log-probabilities of given logits are fp32. So are ours of products with a head; gradients are rounded to bf16.
    if family in LOGITS or (provider.name == OURS and family in SCORES):
        assert error is None or error < 2e-5
    elif provider.name == OURS:
        assert error is not None
        assert error < 5e-3


# --------------------------------------------------------------------------------- checks that cannot be fooled


def nudged(x: Tensor, index: tuple[int, ...], by: float = 1e-2) -> Tensor:
    x = x.clone()
    x[index] += by
    return x


def swapped(ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids[0, [0, 1]] = ids[0, [1, 0]]
    return ids


def outside_head(drawn: Drawn) -> Drawn:
    """The first tail draw of a row is a member of its head, with the scores of that member."""
    out = Drawn(*(part.clone() for part in drawn))
    out.ids[0, 3], out.logprobs[0, 3] = out.ids[0, 0], out.logprobs[0, 0]
    return out


FAULTS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("topk", "two ids swapped", lambda o: o._replace(ids=swapped(o.ids))),
    ("topk", "a wrong score", lambda o: o._replace(logprobs=nudged(o.logprobs, (20, 7)))),
    ("topk", "a NaN", lambda o: o._replace(logprobs=nudged(o.logprobs, (0, 0), float("nan")))),
    ("topk", "a wrong LSE", lambda o: o._replace(logsumexp=nudged(o.logsumexp, (0,)))),
    ("support", "a wrong weight", lambda o: o._replace(log_weights=nudged(o.log_weights, (20, 7)))),
    ("support", "a head weight", lambda o: o._replace(log_weights=nudged(o.log_weights, (0, 0)))),
    ("support", "a draw in the head", outside_head),
    ("gather", "a wrong score", lambda o: Gathered(nudged(o.logprobs, (0, 0)), o.dlogits)),
    ("gather", "the softmax term lost", lambda o: Gathered(o.logprobs, o.dlogits.clamp(min=0.0))),
    ("gather", "the sign turned", lambda o: Gathered(o.logprobs, -o.dlogits)),
    ("kl", "the +1 of the plain derivative", lambda o: Loss(o.value, o.grad + 1e-3)),
    ("kl", "a sum in place of a mean", lambda o: Loss(o.value * 21, o.grad)),
    ("kl", "a NaN", lambda o: Loss(o.value, nudged(o.grad, (0, 0), float("nan")))),
    ("linear_topk", "an id twice", lambda o: o._replace(ids=o.ids[:, [0, 0, *range(2, 8)]])),
    ("linear_topk", "a wrong score", lambda o: o._replace(logprobs=nudged(o.logprobs, (20, 7)))),
    ("linear_gather", "a wrong score", lambda o: o._replace(logprobs=nudged(o.logprobs, (20, 7)))),
    ("exact_head_frozen", "a wrong loss", lambda o: replace(o, loss=1.01 * o.loss + 1e-3)),
    ("exact_head_frozen", "rows of dH shifted by one", lambda o: replace(o, dhidden=o.dhidden.roll(1, 0))),
    ("exact_head_frozen", "a dW", lambda o: replace(o, dweight=o.dhidden)),
    ("exact_head", "no dW", lambda o: replace(o, dweight=None)),
    *(
        fault
        for head in HEADS
        for fault in (
            (head, "a wrong loss", lambda o: replace(o, loss=1.01 * o.loss + 1e-3)),
            (head, "rows of dH shifted by one", lambda o: replace(o, dhidden=o.dhidden.roll(1, 0))),
            (head, "rows of dW shifted by one", lambda o: replace(o, dweight=o.dweight.roll(1, 0))),
            (head, "divided by N - 1", lambda o: replace(o, dweight=o.dweight * 21 / 20)),
        )
    ),
]


@pytest.mark.parametrize(("family", "what", "fault"), [pytest.param(*f, id=f"{f[0]}: {f[1]}") for f in FAULTS])
def test_a_planted_fault_is_wrong(family: str, what: str, fault: Callable[[Any], Any]) -> None:
    ours = FAMILIES[family].provider(OURS)
    inputs = FAMILIES[family].inputs(tiny(family), CPU)
    oracle = FAMILIES[family].oracle(inputs)
    output = ours.prepare(inputs)()
    assert ours.check is not None
    ours.check(oracle, output)
    with pytest.raises(Wrong):
        ours.check(oracle, fault(output))


@pytest.mark.parametrize("family", HEADS)
def test_masked_rows_have_no_gradient_and_divide_nothing(family: str) -> None:
    """The oracle of a masked case is that of its valid rows alone."""
    whole = FAMILIES[family].inputs(tiny(family), CPU)
    half = whole.with_masked(1 / 3)
    valid = half.mask.nonzero().squeeze(1)
    assert len(valid) == half.case.valid_rows == 14
    alone = replace(
        whole,
        case=replace(whole.case, rows=14),
        hidden=whole.hidden[valid].detach().requires_grad_(),
        support=whole.support[valid],
    )
    ours = FAMILIES[family].provider(OURS)
    masked, only = ours.prepare(half)(), ours.prepare(alone)()
    torch.testing.assert_close(masked.loss, only.loss)
    torch.testing.assert_close(masked.dhidden[valid], only.dhidden)
    torch.testing.assert_close(masked.dweight, only.dweight)
    assert not masked.dhidden[~half.mask].any()


def test_the_limit_of_a_gpu_case_writes_what_the_loss_writes() -> None:
    inputs = FAMILIES["kl"].inputs(replace(tiny("kl"), size="gpu"), CPU)
    written, ids = FAMILIES["kl"].provider(LIMIT).prepare(inputs)()
    student, support = inputs.student_logprobs.detach(), inputs.support
    torch.testing.assert_close(written, student + support.teacher_logprobs * support.log_weights)
    assert torch.equal(ids, support.ids.amax(1))
    read = [student, support.teacher_logprobs, support.log_weights, support.ids]
    assert sum(t.numel() * t.itemsize for t in (*read, written)) == inputs.case.work.bytes
