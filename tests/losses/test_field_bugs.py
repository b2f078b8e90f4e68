"""Bugs seen in other projects, one test each, named after the bug. Those that need a GPU live with the kernels."""

import itertools
import math
from typing import Any

import pytest
import torch
from each_backend import rounding_of_dz
from oracle import dense_reverse, reverse_gradient
from scenes import full_support, scene, support
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from asyncopd import (
    Correction,
    Support,
    forward_kl,
    gather_logprobs,
    linear_forward_kl,
    linear_reverse_kl,
    linear_topk_logprobs,
    reverse_kl,
    sample_support,
    topk_logprobs,
)
from asyncopd.backends import reference
from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference import rows
from asyncopd.backends.reference.head import Head

INF = float("inf")
LINEAR = ("linear_gather_logprobs", "linear_gather_logprobs_backward")
GATHER = ("gather_logprobs", "gather_logprobs_backward")


@pytest.mark.ops("topk_logprobs", "gather_logprobs", "sample_support")
def test_int32_overflow_of_row_offsets(engine: str, rng: torch.Generator) -> None:
    # Two rows 2^31 elements apart. The storage is never touched in between, so it costs address space and no memory.
    far = 2**31 + 64
    logits = torch.empty(far + 100, dtype=torch.bfloat16).as_strided((2, 100), (far, 1))
    logits.copy_(torch.randn(2, 100, generator=rng))
    near = logits.clone()
    ids = torch.tensor([[3, 99], [0, 50]])
    # Triton adds up a row in an order that depends on whether the stride is a multiple of 16: 2^31 + 64 is, 100 is not.
    torch.testing.assert_close(gather_logprobs(logits, ids), gather_logprobs(near, ids), rtol=0, atol=1e-6)
    assert torch.equal(topk_logprobs(logits, 5).ids, topk_logprobs(near, 5).ids)
    drawn = sample_support(logits, num_samples=4, head=2, seed=1)
    assert torch.equal(drawn.ids, sample_support(near, num_samples=4, head=2, seed=1).ids)


@pytest.mark.ops("topk_logprobs", "gather_logprobs", "sample_support", *LINEAR)
@pytest.mark.parametrize("vocab", [1, 2, 31, 33, 127, 129, 1023, 1025, 4097])
def test_vocabulary_not_a_tile_multiple_gives_positive_logprobs(engine: str, rng: torch.Generator, vocab: int) -> None:
    # All-negative logits: zeros read past the end of a row, or padded in, would outweigh them.
    logits = torch.randn(3, vocab, generator=rng) - 50
    exact = logits.double().log_softmax(1)
    every = torch.arange(vocab).expand(3, vocab)
    k = min(vocab, 1024) if engine == "triton" else vocab  # its limit
    top = topk_logprobs(logits, k)
    drawn = sample_support(logits, num_samples=1, head=min(k, vocab - 1), seed=0)
    for ids, lp in ((every, gather_logprobs(logits, every)), (top.ids, top.logprobs), (drawn.ids, drawn.logprobs)):
        assert (lp <= 1e-5).all()
        torch.testing.assert_close(lp.double(), exact.gather(1, ids), rtol=0, atol=1e-5)
    # The same through a head, whose bias makes the logits.
    hidden, weight = torch.zeros(3, 2), torch.zeros(vocab, 2)
    lp = topk_logprobs((hidden @ weight.t()) + logits[0], k).logprobs
    linear = linear_topk_logprobs(hidden, weight, k, bias=logits[0]).logprobs
    torch.testing.assert_close(linear, lp)


@pytest.mark.ops("topk_logprobs", "gather_logprobs", "sample_support")
def test_reduction_identity_of_0_for_minus_inf(engine: str, rng: torch.Generator) -> None:
    logits = torch.full((4, 70), -INF)
    logits[:, 41] = -1000.0
    logits[1, 42] = -1000.0
    top = topk_logprobs(logits, 2)
    assert top.ids[:, 0].tolist() == [41] * 4
    assert top.logsumexp.tolist() == pytest.approx([-1000.0, -1000.0 + math.log(2), -1000.0, -1000.0])
    # One unit of an fp32 LSE of 1000 is 6e-5.
    lp = gather_logprobs(logits, torch.full((4, 1), 41)).flatten().tolist()
    assert lp == pytest.approx([0, -math.log(2), 0, 0], abs=1e-4)
    assert set(sample_support(logits, num_samples=32, seed=3).ids.flatten().tolist()) == {41, 42}


@pytest.mark.ops("kl_rows", *LINEAR)
@pytest.mark.parametrize("baseline", ["none", "mean", "loo"])
def test_0_times_inf_from_padding(engine: str, rng: torch.Generator, baseline: Any) -> None:
    inf = torch.full((2, 3), -INF)
    ids = torch.tensor([[4, -1, 2], [-1, -1, -1]])
    scores = torch.where(ids < 0, inf, torch.tensor(-1.5))
    sup = Support(ids, scores, scores + 1.0)
    hidden = torch.randn(2, 3, generator=rng).requires_grad_()
    weight = torch.randn(6, 3, generator=rng).requires_grad_()
    loss = linear_reverse_kl(hidden, weight, sup, baseline=baseline) + linear_forward_kl(hidden, weight, sup)
    loss.backward()
    assert loss.isfinite()
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.ops("topk_logprobs", "sample_support", "kl_rows", *GATHER)
def test_python_floats_becoming_fp64(engine: str, rng: torch.Generator) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.randn(2, 9, generator=rng).to(dtype).requires_grad_()
        top = topk_logprobs(logits, 3, temperature=0.3)
        drawn = sample_support(logits, num_samples=2, head=1, seed=0, temperature=0.3)
        lp = gather_logprobs(logits, top.ids, temperature=0.3)
        loss = reverse_kl(lp, Support.from_topk(top), num_items_in_batch=3.5)
        loss.backward()
        outputs = (top.logprobs, top.logsumexp, drawn.log_weights, drawn.logprobs, drawn.logsumexp, lp, loss)
        assert {t.dtype for t in outputs} == {torch.float32}
        assert logits.grad is not None
        assert logits.grad.dtype == dtype


@pytest.mark.ops(*GATHER)
def test_p_minus_1_rounded_to_bf16(engine: str) -> None:
    # p = 1 - 2.5e-5 is 1 in bf16; p - 1 is not 0.
    logits = torch.tensor([[-12.0, 0.0, -11.0, -11.5]], dtype=torch.bfloat16).requires_grad_()
    (-gather_logprobs(logits, torch.tensor([[1]]))).sum().backward()
    assert logits.grad is not None
    p = logits.detach().double().softmax(1)
    expected = p - torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    # fp32 knows 1 - p to 6e-8 of 2.5e-5, then one rounding to bf16.
    torch.testing.assert_close(logits.grad.double(), expected, rtol=2**-8 + 3e-3, atol=0)


@pytest.mark.ops("kl_rows", "linear_gather_logits", "linear_gather_logits_backward", "linear_logsumexp", *LINEAR)
@pytest.mark.parametrize("options", [{}, {"baseline": "mean"}, {"normalize": "sampled"}], ids=str)
def test_bf16_accumulation_of_dw_and_dh_over_chunks(
    engine: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    # 1024 equal rows, one a chunk: a bf16 sum stops growing at 256 terms. 64 equal entries a row do the same to dH.
    monkeypatch.setattr(rows, "TILE_ELEMENTS", 1)
    n, v = 1024, 3
    ids = torch.tensor([[0, 1, 0] + [0] * 61]).expand(n, 64)
    log_q = torch.randn(v, generator=rng).log_softmax(0)
    sup = Support(ids, log_q[ids], torch.full((n, 64), -math.log(64.0)), "samples")
    hidden = torch.ones(n, 2, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, 2, generator=rng).bfloat16().requires_grad_()
    linear_reverse_kl(hidden, weight, sup, reduction="sum", **options).backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    linear_reverse_kl(wide[0], wide[1], sup, reduction="sum", **options).backward()
    z = (wide[0] @ wide[1].t()).detach().requires_grad_()
    scores = gather_logprobs(z, ids) if options.get("normalize") != "sampled" else z.gather(1, ids)
    reverse_kl(scores, sup, reduction="sum", **options).backward()
    assert z.grad is not None
    # Only the exact loss multiplies dz with the head; where the coefficients sum to 0 their K rows of it are added up.
    of_dz = rounding_of_dz(engine if not options else "reference", z.grad) @ wide[1].detach().abs()
    for mine, theirs, allowed in zip((hidden, weight), wide, (of_dz, torch.zeros(())), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        # One rounding to bf16; what cancels to less than 1e-3 of the largest entry is fp32 rounding.
        bound = 0.51 * 2**-7 * theirs.grad.abs() + 1e-5 * theirs.grad.abs().max() + allowed
        assert ((mine.grad.double() - theirs.grad).abs() - bound).max() <= 0


@pytest.mark.ops("topk_logprobs", "sample_support")
def test_ties_without_a_promised_order(engine: str, rng: torch.Generator) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randint(-2, 3, (8, 4099), generator=rng).to(dtype)
        expected = torch.sort(logits.double(), dim=1, descending=True, stable=True).indices[:, :64]
        assert torch.equal(topk_logprobs(logits, 64).ids, expected)
        assert torch.equal(sample_support(logits, num_samples=1, head=64, seed=0).ids[:, :64], expected)


def test_item_on_the_hot_path(rng: torch.Generator) -> None:
    """On a device the reference never reads data back: tensors without data pass through every op."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, mask, streams = (meta(4, 3, dtype=torch.int64), meta(4, dtype=torch.bool), meta(4, dtype=torch.int64))
    hidden, head = meta(4, 5), Head(meta(9, 5), meta(9), 0.7, 1.3, 5.0)
    reference.topk_logprobs(meta(4, 9), 3, 1.0)
    reference.linear_topk_logprobs(hidden, head, 3)
    reference.gather_logprobs(meta(4, 9), ids, 1.0)
    reference.gather_logprobs_backward(meta(4, 3), meta(4, 9), meta(4), ids, 1.0)
    reference.linear_gather_logprobs(hidden, head, ids, mask)
    reference.linear_gather_logprobs_backward(meta(4, 3), hidden, head, meta(4), ids, mask, True)
    reference.linear_gather_logits(hidden, head, ids, mask)
    reference.linear_gather_logits_backward(meta(4, 3), meta(4, 3), hidden, head, ids, mask, True)
    reference.linear_logsumexp(hidden, head, mask)
    reference.sample_support(meta(4, 9), 3, 2, 0, streams, streams, 1.0)
    scores = (meta(4, 3), meta(4, 3), meta(4, 3), ids, mask)
    corrections = ({}, {"advantage": "behavior", "ratio_cap": 2.0}, {"clip_eps": 0.2}, {"m2_budget": 0.04})
    for normalize, baseline in itertools.product(("exact", "sampled"), ("none", "mean", "loo")):
        for correction in corrections:
            spec = LossSpec(
                normalize=normalize, baseline=baseline, head_is_certain=False, needs_policy=True, **correction
            )
            for proximal in (None, meta(4, 3)) if "clip_eps" in correction else (None,):
                reference.kl_rows(*scores, proximal, spec)
    for divergence, tail in itertools.product(("forward", "reverse"), ("drop", "bucket", "renormalize")):
        reference.kl_rows(*scores, None, LossSpec(divergence=divergence, tail=tail))
    support = (ids, meta(4, 3), meta(4, 3), None)
    reference.linear_kl(hidden, head, mask, *support, meta(), True, True, LossSpec())


def test_item_on_the_hot_path_of_the_public_functions() -> None:
    # Through the wrappers too: checks, reductions and the autograd glue, on tensors whose data cannot be read.
    with FakeTensorMode():
        hidden, weight = torch.empty(4, 5, requires_grad=True), torch.empty(9, 5, requires_grad=True)
        ids, scores = torch.empty(4, 3, dtype=torch.int64), torch.empty(4, 3)
        mask, items = torch.empty(4, dtype=torch.int64), torch.empty(())
        sup = Support(ids, scores, scores, "samples")
        for options in ({}, {"baseline": "mean"}, {"normalize": "sampled"}, {"correction": Correction(m2_budget=0.04)}):
            for n in (None, items):
                linear_reverse_kl(hidden, weight, sup, mask=mask, num_items_in_batch=n, **options).backward()
        linear_forward_kl(hidden, weight, sup, mask=mask, num_items_in_batch=items).backward()
        logits = hidden.detach() @ weight.t()
        reverse_kl(gather_logprobs(logits, ids), sup, mask=mask).backward()
        sample_support(logits, num_samples=2, head=1, seed=ids[:, 0], sampled_ids=ids[:, 0])
        topk_logprobs(logits, 2)
        linear_topk_logprobs(hidden, weight, 2)


@pytest.mark.ops("kl_rows", *GATHER)
@pytest.mark.parametrize("loss", [reverse_kl, forward_kl])
def test_per_row_upstream_gradients_lost(engine: str, rng: torch.Generator, loss: Any) -> None:
    s = scene(rng)
    sup = full_support(s.log_q.float())
    upstream = torch.tensor([0.0, 1.0, -2.0, 10.0, 1e-3])
    logits = s.log_p.float().requires_grad_()
    (one,) = torch.autograd.grad(loss(gather_logprobs(logits, sup.ids), sup, reduction="none").sum(), logits)
    rows_ = loss(gather_logprobs(logits, sup.ids), sup, reduction="none")
    (scaled,) = torch.autograd.grad(rows_, logits, upstream)
    torch.testing.assert_close(scaled, one * upstream[:, None])
    assert (one.abs().sum(1) > 0).all()


@pytest.mark.ops("kl_rows", *LINEAR)
def test_all_rows_masked(engine: str, rng: torch.Generator) -> None:
    s = scene(rng, rows=4)
    sup = support(s, "samples", rng)
    weight = torch.randn(11, 3, generator=rng).requires_grad_()
    hidden = torch.full((4, 3), float("nan")).requires_grad_()
    for loss in (linear_reverse_kl, linear_forward_kl):
        value = loss(hidden, weight, sup, mask=torch.zeros(4))
        value.backward()
        assert value == 0
        assert hidden.grad is not None
        assert weight.grad is not None
        assert (hidden.grad == 0).all()
        assert (weight.grad == 0).all()


@pytest.mark.ops(*GATHER)
def test_unaligned_int64_ids(engine: str, rng: torch.Generator) -> None:
    # A view that starts 8 bytes into its storage, as labels[:, 1:] does: not 16-byte aligned.
    logits = torch.randn(3, 20, generator=rng)
    storage = torch.randint(0, 20, (13,), generator=rng)
    for start in (0, 1):
        ids = storage[start : start + 12].view(3, 4)
        lp = gather_logprobs(logits, ids)
        torch.testing.assert_close(lp, logits.log_softmax(1).gather(1, ids))
    odd = torch.randn(61, generator=rng).bfloat16()[1:].view(3, 20)
    torch.testing.assert_close(gather_logprobs(odd, ids), odd.float().log_softmax(1).gather(1, ids))


@pytest.mark.parametrize("u", [0.0, 2.0**-54, 1 - 2.0**-53, 1.0])
def test_sampling_with_u_0_or_1(monkeypatch: pytest.MonkeyPatch, u: float) -> None:
    # Even a uniform at its very ends picks a token that can occur: not the banned first or last one.
    from asyncopd.backends.reference import sample

    monkeypatch.setattr(sample, "uniforms", lambda s, r, m: torch.full((len(s), m), u, dtype=torch.float64))
    logits = torch.zeros(1, 6, dtype=torch.float64)
    logits[0, [0, 5]] = -INF
    ids = sample_support(logits, num_samples=2, seed=0).ids
    assert ids.tolist() == [[1, 1]] if u < 0.5 else [[4, 4]]


@pytest.mark.ops("sample_support")
def test_sampling_with_bf16_maxima(engine: str) -> None:
    # 300 near-equal logits that bf16 rounds upwards or downwards: masses must come from the logits as they are in fp32.
    fine = torch.linspace(3.97, 4.03, 300)
    exact = sample_support(fine.expand(50, 300), num_samples=64, seed=1)
    rounded = sample_support(fine.bfloat16().float().expand(50, 300), num_samples=64, seed=1)
    assert not torch.equal(exact.ids, rounded.ids)
    torch.testing.assert_close(exact.logprobs, fine.log_softmax(0)[exact.ids])


@pytest.mark.ops("sample_support")
def test_sampling_with_seeds_that_collide(engine: str) -> None:
    # seed + row, seed ^ row or a 32-bit cut would make (0, row 1) meet (1, row 0), or 0 meet 2^32.
    z = torch.zeros(8, 1000)
    draws = [tuple(r) for s in (0, 1, 2, 2**32, 2**40) for r in sample_support(z, num_samples=16, seed=s).ids.tolist()]
    assert len(set(draws)) == len(draws)


@pytest.mark.ops("kl_rows", *LINEAR)
def test_denominator_over_micro_batches_is_rows_and_not_batches(engine: str, rng: torch.Generator) -> None:
    s = scene(rng, rows=10)
    sup = support(s, "samples", rng)
    sup = Support(sup.ids, sup.teacher_logprobs.float(), sup.log_weights.float(), "samples")
    hidden, weight = torch.randn(10, 3, generator=rng), torch.randn(11, 3, generator=rng)
    mask = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    whole = linear_reverse_kl(hidden, weight, sup, mask=mask)
    parts = [(slice(0, 4), 1), (slice(4, 10), 6)]
    right = sum(linear_reverse_kl(hidden[r], weight, sup[r], mask=mask[r], num_items_in_batch=7) for r, _ in parts)
    mean_of_means = sum(linear_reverse_kl(hidden[r], weight, sup[r], mask=mask[r]) for r, _ in parts) / 2
    torch.testing.assert_close(right, whole)
    assert (mean_of_means - whole).abs() > 1e-2


@pytest.mark.ops("kl_rows", "topk_logprobs", "sample_support", *LINEAR)
def test_temperature_on_one_side_only(engine: str, rng: torch.Generator) -> None:
    # Every function divides its own logits: with the same model on both sides the loss is 0 at any temperature.
    hidden, weight = torch.randn(6, 4, generator=rng), 2 * torch.randn(30, 4, generator=rng)
    logits = hidden @ weight.t()
    for t in (0.3, 1.0, 4.0):
        drawn = sample_support(logits, num_samples=6, head=4, seed=1, temperature=t)
        teacher = gather_logprobs(logits, drawn.ids, temperature=t)
        torch.testing.assert_close(teacher, topk_logprobs(logits, 30, temperature=t).logprobs.gather(
            1, torch.sort(topk_logprobs(logits, 30).ids, dim=1).indices.gather(1, drawn.ids)))  # fmt: skip
        sup = Support(drawn.ids, teacher, drawn.log_weights, "head_tail")
        for loss in (linear_reverse_kl, linear_forward_kl):
            assert loss(hidden, weight, sup, temperature=t).abs() < 1e-5
            assert loss(hidden, weight, sup, temperature=t * 1.5).abs() > 1e-2


@pytest.mark.ops("kl_rows", *GATHER)
def test_temperature_squared_is_not_smuggled_in(engine: str, rng: torch.Generator) -> None:
    s = scene(rng)
    sup = full_support(s.log_q.float())
    logits = s.log_p.float().requires_grad_()
    reverse_kl(gather_logprobs(logits, sup.ids, temperature=2.0), sup, reduction="sum").backward()
    log_p = (s.log_p / 2).log_softmax(1)
    assert logits.grad is not None
    expected = reverse_gradient(log_p, s.log_q) / 2  # one factor 1 / T from the chain rule, none besides
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_truncated_reverse_kl_minimised_by_pushing_mass_off_the_support() -> None:
    """From teacher == student, 300 steps: the plain derivative empties the support, this one stays where it is."""
    teacher = torch.linspace(2, -2, 40, dtype=torch.float64).log_softmax(0)[None]
    sup = Support.from_topk(topk_logprobs(teacher, 8))

    def mass_after(plain: bool) -> float:
        z = teacher.clone()
        for _ in range(300):
            z.requires_grad_()
            at_ids = gather_logprobs(z, sup.ids)
            if plain:
                loss = (at_ids.exp() * (at_ids - sup.teacher_logprobs)).sum()
            else:
                loss = reverse_kl(at_ids, sup)
            z = (z - torch.autograd.grad(loss, z)[0]).detach()
        return float(z.log_softmax(1).gather(1, sup.ids).exp().sum())

    before = float(sup.teacher_logprobs.exp().sum())
    assert mass_after(plain=True) < before / 2
    assert mass_after(plain=False) == pytest.approx(before, abs=1e-9)


@pytest.mark.ops("kl_rows", *GATHER)
def test_clamps_that_zero_the_gradient_where_the_student_is_worst(engine: str) -> None:
    # The teacher is sure of token 0, which the student gives e^-60; and the student of token 1, the teacher's e^-60.
    logits = torch.tensor([[-60.0, 0.0, -30.0]]).requires_grad_()
    sup = full_support(torch.tensor([[0.0, -60.0, -30.0]]))
    loss = forward_kl(gather_logprobs(logits, sup.ids), sup)
    loss.backward()
    assert loss.item() == pytest.approx(60, rel=1e-5)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-1.0, 1.0, 0.0], abs=1e-5)
    # Reverse, of one sample: c = w p A, with A = 60 in full.
    one = Support(torch.tensor([[1]]), torch.tensor([[-60.0]]), torch.tensor([[0.0]]), "samples")
    student = torch.zeros(1, 1).requires_grad_()
    reverse_kl(student, one).backward()
    assert student.grad is not None
    assert student.grad.item() == pytest.approx(60.0)


def test_k3_backpropagated(rng: torch.Generator) -> None:
    """The expected gradient of one sample is the reverse KL's; that of k3, differentiated, is the forward KL's."""
    s = scene(rng, rows=1, vocab=7, stale=False)
    ids = torch.arange(7)[:, None]  # every outcome of one draw, with its probability
    logits = s.log_p.clone().requires_grad_()
    at_ids = gather_logprobs(logits.expand(7, 7), ids)
    sup = Support(ids, s.log_q[0][ids], -s.log_mu[0][ids], "samples")
    expected = (s.log_mu[0].exp() * reverse_kl(at_ids, sup, reduction="none")).sum()
    (mine,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(expected, dense_reverse(s.log_p, s.log_q)[0])
    torch.testing.assert_close(mine, reverse_gradient(s.log_p, s.log_q))
    log_ratio = s.log_q[0] - logits.log_softmax(1)[0]
    (k3,) = torch.autograd.grad((s.log_mu[0].exp() * (log_ratio.exp() - 1 - log_ratio)).sum(), logits)
    torch.testing.assert_close(k3, s.log_p.exp() - s.log_q.exp())
    assert (mine - k3).abs().max() > 1e-2
