"""The C++ loss kernel against the reference in fp64, on every instruction set of this machine."""

import itertools
from dataclasses import replace

import pytest
import torch
from loss_rows import INF, NAN, SAMPLED, SAMPLES, TRUE, Rows, binds_by_rounding, make_rows
from loss_rows import assert_matches as assert_are_the_references

from asyncopd.backends.cpu import kl as cpu
from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference import kl as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 15, 16, 17, 64, 300]


def assert_matches(r: Rows, spec: LossSpec, isa: int, tolerance: float = 2e-6) -> None:
    assert_are_the_references(r, spec, cpu.kl_rows(*r, spec, isa=isa), tolerance)


@pytest.mark.parametrize("num_ids", WIDTHS)
def test_every_option_on_samples(num_ids: int, isa: int) -> None:
    for spec in SAMPLED:
        if num_ids > 1 or not binds_by_rounding(spec):
            assert_matches(make_rows(37, num_ids, "samples", pads=not binds_by_rounding(spec)), spec, isa)


@pytest.mark.parametrize("num_ids", WIDTHS)
@pytest.mark.parametrize("cap", [0.9, 1.2, 5.0])
def test_decoupled_clip(num_ids: int, cap: float, isa: int) -> None:
    for baseline, advantage in itertools.product(("none", "mean", "loo"), ("current", "behavior")):
        options = {"baseline": baseline, "advantage": advantage, "clip_eps": 0.2, "proximal_cap": cap}
        spec = replace(SAMPLES, needs_policy=True, **options)
        if num_ids > 1 or not binds_by_rounding(spec):
            r = make_rows(21, num_ids, "samples", proximal=True, pads=not binds_by_rounding(spec))
            assert_matches(r, spec, isa)


@pytest.mark.parametrize("num_ids", WIDTHS)
def test_head_and_tail_and_top_k(num_ids: int, isa: int) -> None:
    for draw, divergence, normalize, baseline in itertools.product(
        ("head_tail", "top_k"), ("reverse", "forward"), ("exact", "sampled"), ("none", "mean", "loo")
    ):
        spec = LossSpec(divergence=divergence, normalize=normalize, baseline=baseline)
        assert_matches(make_rows(37, num_ids, draw), spec, isa)
    for spec in TRUE:
        r = make_rows(37, num_ids, "top_k")
        # Most of the mass on the support, but not so much that its rest is a few rounding errors of fp32.
        assert_matches(r._replace(student=r.student - 0.05, teacher=r.teacher - 0.05), spec, isa, tolerance=6e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64], ids=str)
def test_dtypes_and_layouts(dtype: torch.dtype, id_type: torch.dtype, isa: int) -> None:
    for num_ids in (3, 40):
        r = make_rows(20, num_ids, "samples", proximal=True)
        floats = [t.to(dtype) for t in (*r[:3], r.proximal)]  # type: ignore[union-attr]
        r = Rows(*floats[:3], r.ids.to(id_type), r.mask, floats[3])
        spec = replace(SAMPLES, needs_policy=True, clip_eps=0.1, baseline="loo")
        assert_matches(r, spec, isa)
        transposed = Rows(*(None if t is None else t.t().contiguous().t() for t in r))
        strided = Rows(*(None if t is None else t[::2] for t in r))
        assert_matches(transposed, spec, isa)
        assert_matches(strided, spec, isa)
        plain = cpu.kl_rows(*r._replace(proximal=None), SAMPLES, isa=isa)[1]
        assert (plain[(r.ids < 0) | ~r.mask[:, None]] == 0).all()  # type: ignore[index]


@pytest.mark.parametrize("draw", ["samples", "head_tail", "top_k"])
@pytest.mark.parametrize("num_ids", [1, 20])
def test_special_values(num_ids: int, draw: str, isa: int) -> None:
    """-inf, NaN, inf and logarithms that dwarf all others, on either side or both, one row each."""
    specials = list(itertools.product([-INF, NAN, -1.0, -200.0, 60.0, INF], repeat=2))
    r = make_rows(len(specials), num_ids, draw, pads=False, masked=False)
    for n, (p, q) in enumerate(specials):
        r.student[n, num_ids // 2], r.teacher[n, num_ids // 2] = p, q
    specs = [SAMPLES, replace(SAMPLES, normalize="sampled"), replace(SAMPLES, baseline="mean"),
             replace(SAMPLES, baseline="loo"), LossSpec(divergence="forward")]  # fmt: skip
    if draw == "samples":
        specs += [replace(SAMPLES, needs_policy=True, ratio_cap=1.1), replace(SAMPLES, needs_policy=True, clip_eps=0.1)]
    if draw == "top_k":
        specs += TRUE
    wide = [t.float() if t is not None and t.is_floating_point() else t for t in r]
    for spec in specs:
        got, want = cpu.kl_rows(*r, spec, isa=isa), reference.kl_rows(*wide, spec)  # type: ignore[arg-type]
        for a, b in zip(got[:2], want[:2], strict=True):
            finite = b.isfinite()
            torch.testing.assert_close(a[finite], b[finite], rtol=2e-4, atol=2e-5)
            torch.testing.assert_close(a[~finite], b[~finite], rtol=0, atol=0, equal_nan=True)


def test_weights_of_nothing_and_of_everything(isa: int) -> None:
    for value in (-INF, INF, NAN):
        r = make_rows(6, 20, "samples", pads=False, masked=False)
        r.log_weights[2, 5] = value
        for spec in (SAMPLES, replace(SAMPLES, normalize="sampled"), replace(SAMPLES, needs_policy=True, ratio_cap=1.1),
                     replace(SAMPLES, needs_policy=True, clip_eps=0.1), LossSpec(divergence="forward")):  # fmt: skip
            got, want = cpu.kl_rows(*r, spec, isa=isa), reference.kl_rows(*r, spec)
            for a, b in zip(got[:2], want[:2], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_full_bucket_has_the_floor_of_fp32(isa: int) -> None:
    """The whole mass on the support: what is left is 8 rounding errors, not 0, and its logarithm not -inf."""
    r = make_rows(8, 20, "top_k", pads=False, masked=False)
    r = r._replace(student=r.student.log_softmax(1) + 1e-6, teacher=r.teacher.log_softmax(1) - 0.1)
    for divergence in ("reverse", "forward"):
        spec = LossSpec(divergence=divergence, tail="bucket")
        for a, b in zip(cpu.kl_rows(*r, spec, isa=isa)[:2], reference.kl_rows(*r, spec)[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_ids", [1, 7, 64])
def test_threads_do_not_change_a_bit(num_ids: int, isa: int) -> None:
    r = make_rows(40_000 // num_ids, num_ids, "samples")
    for spec in (SAMPLES, replace(SAMPLES, needs_policy=True, m2_budget=0.02, baseline="loo", normalize="sampled")):
        one = cpu.kl_rows(*r, spec, threads=1, isa=isa)
        for threads in (2, 3, 8):
            many = cpu.kl_rows(*r, spec, threads=threads, isa=isa)
            assert all(a.equal(b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("num_ids", [1, 7, 16, 23])
def test_a_row_does_not_depend_on_the_batch(num_ids: int, isa: int) -> None:
    r = make_rows(37, num_ids, "samples", pads=False, masked=False, proximal=True)
    spec = replace(SAMPLES, needs_policy=True, clip_eps=0.1, baseline="loo", normalize="sampled")
    losses, coef, _ = cpu.kl_rows(*r, spec, isa=isa)
    for n in (0, 15, 16, 36):
        one = Rows(*(None if t is None else t[n : n + 1] for t in r))
        alone = cpu.kl_rows(*one, spec, isa=isa)
        assert alone[0].equal(losses[n : n + 1])
        assert alone[1].equal(coef[n : n + 1])


@pytest.mark.parametrize(("rows", "num_ids"), [(0, 4), (3, 0), (0, 0), (0, 64)])
def test_empty(rows: int, num_ids: int, isa: int) -> None:
    r = Rows(*(torch.zeros(rows, num_ids) for _ in range(3)), torch.zeros(rows, num_ids, dtype=torch.int64), None, None)
    for spec in (SAMPLES, LossSpec(tail="bucket"), replace(SAMPLES, needs_policy=True, m2_budget=0.1)):
        losses, coef, metrics = cpu.kl_rows(*r, spec, isa=isa)
        assert losses.shape == (rows,)
        assert coef.shape == (rows, num_ids)
        assert (losses == 0).all()
        assert (metrics == 0).all()


def test_refusals(isa: int) -> None:
    samples, certain = make_rows(5, 20, "samples"), make_rows(5, 20, "top_k")
    for tail, divergence in itertools.product(("bucket", "renormalize"), ("reverse", "forward")):
        with pytest.raises(ValueError, match=f"tail: got '{tail}' with a sampled support"):
            cpu.kl_rows(*samples[:5], None, LossSpec(tail=tail, divergence=divergence), isa=isa)
    for correction in ({"ratio_cap": 1.1}, {"m2_budget": 0.1}, {"advantage": "behavior"}):
        with pytest.raises(ValueError, match="correction: needs the behaviour policy"):
            cpu.kl_rows(*certain[:5], None, LossSpec(needs_policy=True, **correction), isa=isa)
        assert_matches(certain, replace(SAMPLES, needs_policy=True, **correction), isa)
    with pytest.raises(RuntimeError, match="status 2"):
        cpu.kl_rows(*samples[:5], None, LossSpec(clip_eps=0.1), isa=isa)  # without a policy to clip against
    with pytest.raises(ValueError, match=r"teacher: got shape \[5, 19\], expected \[5, 20\]"):
        cpu.kl_rows(samples.student, samples.teacher[:, 1:], *samples[2:5], None, SAMPLES, isa=isa)
    with pytest.raises(ValueError, match=r"mask: got shape \[4\], expected \[5\]"):
        cpu.kl_rows(*samples[:4], torch.ones(4), None, SAMPLES, isa=isa)
    with pytest.raises(TypeError, match=r"ids: got torch\.int16"):
        cpu.kl_rows(*samples[:3], samples.ids.short(), None, None, SAMPLES, isa=isa)


def test_exponential_of_both_signs(isa: int) -> None:
    """w q of a row of one, the coefficient of a forward KL: every exponent, the ends, and NaN."""
    x = torch.cat([torch.linspace(-86, 88.72, 300_001), torch.tensor([0.0, -0.0, 88.7228, 88.73, 89.0, 300.0, INF,
                                                                      -105.0, -1e30, -INF, NAN])])[:, None]  # fmt: skip
    zeros = torch.zeros_like(x)
    coef = -cpu.kl_rows(zeros, x, zeros, zeros.long(), None, None, LossSpec(divergence="forward"), isa=isa)[1]
    expected = x.double().exp()
    inside = (x >= -86) & (x <= 88.7228)
    assert ((coef.double() - expected).abs() / expected)[inside].max() < 2e-7
    torch.testing.assert_close(coef[-8:], expected[-8:].float(), rtol=0, atol=1e-37, equal_nan=True)


def test_second_moment_threshold_is_exact(isa: int) -> None:
    """Ratios in one bin of the histogram, in several, and equal ones; the budget below, at and above their mean."""
    generator = torch.Generator().manual_seed(3)
    for spread in (0.0, 1e-4, 0.3, 5.0):
        log_ratio = 0.2 + spread * torch.rand(500, 1, generator=generator)
        log_mu = torch.full((500, 1), -7.0)
        student = log_mu + log_ratio
        r = Rows(student, student + 1.0, -log_mu, torch.zeros(500, 1, dtype=torch.int64), None, None)
        mean = float((student + r.log_weights).double().square().mean())
        for share in (0.1, 0.5, 0.9, 0.999, 1.001, 2.0):
            spec = replace(SAMPLES, needs_policy=True, m2_budget=share * mean)
            losses = cpu.kl_rows(*r, spec, isa=isa)[0].double()
            # The value of a clipped entry is that of the ratio at the threshold.
            ratio = torch.minimum((student + r.log_weights).double()[:, 0], (-losses).log())
            torch.testing.assert_close(float(ratio.square().mean()), min(share, 1.0) * mean, rtol=1e-5, atol=0)
