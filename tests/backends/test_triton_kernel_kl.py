"""The [N, K] loss in Triton against the reference in fp64: every option, every width of a block, more than one program.

Rows are as many as make the last program a part of one: programs have 512 entries, of rows padded to a power of two.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from each_backend import DEVICES
from loss_rows import (
    INF,
    NAN,
    SAMPLED,
    SAMPLES,
    TRUE,
    Rows,
    assert_matches,
    binds_by_rounding,
    expected_of,
    make_rows,
)
from torch import Tensor

from asyncopd.backends.loss_spec import LossMetrics, LossSpec
from asyncopd.backends.reference import kl as reference
from asyncopd.kernels import kl_rows
from asyncopd.kernels.kl import ENTRIES, MAX_IDS
from asyncopd.kernels.kl_metrics import COARSE, FINE, FINE_BLOCK, REDUCE_BLOCK, SUMS, launch_metrics

DEVICE = DEVICES["triton"]
SIZES = [(ENTRIES + 9, 1), (11, 64), (3, 200)]
POLICY = replace(SAMPLES, needs_policy=True)


def run(r: Rows, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    losses, coef, metrics = kl_rows(*(None if t is None else t.to(DEVICE) for t in r), spec)  # type: ignore[arg-type]
    return losses.cpu(), coef.cpu(), metrics.cpu()


def check_samples(rows: int, num_ids: int, spec: LossSpec) -> None:
    if num_ids > 1 or not binds_by_rounding(spec):
        r = make_rows(rows, num_ids, "samples", pads=not binds_by_rounding(spec))
        assert_matches(r, spec, run(r, spec))


@pytest.mark.parametrize("baseline", ["none", "mean", "loo"])
def test_every_option_on_samples(baseline: str) -> None:
    for i, spec in enumerate(SAMPLED):
        if spec.baseline == baseline:
            check_samples(70, 5, replace(spec, metrics=i % 3 == 0))


@pytest.mark.parametrize(("rows", "num_ids"), SIZES)
def test_every_width_of_a_block(rows: int, num_ids: int) -> None:
    # One of each correction (there are seven), with different baselines and both normalisations.
    for spec in SAMPLED[num_ids % 3 :: 8]:
        check_samples(rows, num_ids, spec)


@pytest.mark.parametrize("cap", [0.9, 5.0])
def test_decoupled_clip(cap: float) -> None:
    for baseline, advantage in itertools.product(("none", "mean", "loo"), ("current", "behavior")):
        spec = replace(POLICY, baseline=baseline, advantage=advantage, clip_eps=0.2, proximal_cap=cap)
        r = make_rows(20, 6, "samples", proximal=True, pads=not binds_by_rounding(spec))
        assert_matches(r, spec, run(r, spec))


@pytest.mark.parametrize(("rows", "num_ids"), [(ENTRIES + 9, 1), (70, 5)])
def test_head_and_tail_and_top_k(rows: int, num_ids: int) -> None:
    for normalize, baseline in itertools.product(("exact", "sampled"), ("mean", "loo")):
        spec = LossSpec(normalize=normalize, baseline=baseline)
        r = make_rows(rows, num_ids, "head_tail")
        assert_matches(r, spec, run(r, spec))
    for spec in [*TRUE, LossSpec(divergence="forward"), LossSpec(baseline="mean")]:
        r = make_rows(rows, num_ids, "top_k")
        # Most of the mass on the support, but not so much that its rest is a few rounding errors of fp32.
        r = r._replace(student=r.student - 0.05, teacher=r.teacher - 0.05)
        assert_matches(r, spec, run(r, spec), tolerance=6e-6)
    r = make_rows(rows, num_ids, "head_tail")
    assert_matches(r, LossSpec(divergence="forward"), run(r, LossSpec(divergence="forward")))


@pytest.mark.parametrize("spec", [SAMPLES, LossSpec(divergence="forward"), LossSpec(tail="bucket")], ids=str)
def test_a_fault_of_one_sign_weight_or_index_is_seen(spec: LossSpec) -> None:
    """That the comparison of these tests is not blind: what is right passes, and what is a little wrong does not."""
    r = make_rows(11, 20, "top_k" if spec.tail == "bucket" else "samples", pads=False, masked=False)
    losses, coef, metrics = run(r, spec)
    assert_matches(r, spec, (losses, coef, metrics), tolerance=6e-6)
    faults = (
        (losses * (1 + 1e-3), coef, metrics),
        (losses, -coef, metrics),
        (losses, coef * 1.05, metrics),
        (losses, coef.roll(1, 1), metrics),
        (losses.roll(1), coef.roll(1, 0), metrics),
        (losses, coef, metrics * 12 / 11),
    )
    for fault in faults:
        with pytest.raises(AssertionError):
            assert_matches(r, spec, fault, tolerance=6e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    spec = replace(POLICY, clip_eps=0.1, baseline="loo")
    for num_ids, id_type in ((3, torch.int32), (40, torch.int64)):
        r = make_rows(20, num_ids, "samples", proximal=True)
        r = Rows(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in r))
        r = r._replace(ids=r.ids.to(id_type))
        transposed = Rows(*(None if t is None else t.t().contiguous().t() for t in r))
        strided = Rows(*(None if t is None else t[::2] for t in r))
        narrow = Rows(*(t if t is None or t.dim() == 1 else t[:, 1::2] for t in r))
        for layout in (r, transposed, strided, narrow) if dtype == torch.float32 else (r, transposed):
            assert_matches(layout, spec, run(layout, spec))


@pytest.mark.parametrize("draw", ["samples", "head_tail", "top_k"])
def test_special_values(draw: str) -> None:
    """-inf, NaN, inf and logarithms that dwarf all others, on either side or both, one row each."""
    specials = list(itertools.product([-INF, NAN, -1.0, -200.0, 60.0, INF], repeat=2))
    specs = [SAMPLES, replace(SAMPLES, normalize="sampled"), replace(SAMPLES, baseline="mean"),
             replace(SAMPLES, baseline="loo"), LossSpec(divergence="forward")]  # fmt: skip
    if draw == "samples":
        specs += [replace(POLICY, ratio_cap=1.1), replace(POLICY, clip_eps=0.1)]
    if draw == "top_k":
        specs += TRUE
    num_ids = 1 if draw == "head_tail" else 20
    r = make_rows(len(specials), num_ids, draw, pads=False, masked=False)
    for n, (p, q) in enumerate(specials):
        r.student[n, num_ids // 2], r.teacher[n, num_ids // 2] = p, q
    for spec in specs:
        got, want = run(r, spec), reference.kl_rows(*r, spec)
        # Normalised over the sample, large terms cancel: what fp32 leaves of them in the reference is rounding.
        exact = expected_of(r, spec) if spec.normalize == "sampled" else want
        for a, b, c in zip(got[:2], want[:2], exact[:2], strict=True):
            finite = b.isfinite() & c.isfinite()
            torch.testing.assert_close(a[finite].double(), c[finite].double(), rtol=2e-4, atol=2e-5)
            torch.testing.assert_close(a[~finite], b[~finite], rtol=2e-4, atol=2e-5, equal_nan=True)
        # Where one row has no number its mean has none; the share of what a clip changed still is one.
        torch.testing.assert_close(got[2].isnan(), want[2].isnan(), rtol=0, atol=0)


def test_a_correction_counts_what_it_changed() -> None:
    """Not an entry without mass, nor one without a gradient, nor one that was not drawn."""
    student = torch.tensor([[-INF, -1.0, -1.0, -1.0, -1.0]]).repeat(2, 1)
    teacher = torch.tensor([[-2.0, -2.0, -INF, -2.0, -2.0]]).repeat(2, 1)
    log_w = torch.full_like(student, 2.0 - math.log(5))
    log_w[0, 4] = 0.0
    r = Rows(student, teacher, log_w, torch.zeros(2, 5, dtype=torch.int64), None, None)
    dropped = r._replace(proximal=torch.full_like(student, 5.0))
    for rows, spec in ((r, replace(POLICY, ratio_cap=0.1)), (dropped, replace(POLICY, clip_eps=0.1))):
        assert run(rows, spec)[2][6] == torch.tensor(6 / 10)
        assert run(rows, replace(spec, head_is_certain=True))[2][6] == torch.tensor(5 / 9)
        assert_matches(rows, spec, run(rows, spec))


def test_large_logits_are_normalised_to_the_last_digit() -> None:
    r = make_rows(11, 20, "samples", pads=False, masked=False)
    r = r._replace(student=r.student + 100.3)
    spec = replace(SAMPLES, normalize="sampled", baseline="loo")
    _, coef, metrics = run(r, spec)
    _, expected, _ = expected_of(r, spec)
    assert ((coef - expected).abs() / expected.abs().amax(1, keepdim=True)).max() < 1e-6
    assert (metrics[0] - 1.0).abs() < 2e-7


def test_weights_of_nothing_and_of_everything() -> None:
    for value in (-INF, INF, NAN):
        r = make_rows(6, 20, "samples", pads=False, masked=False)
        r.log_weights[2, 5] = value
        for spec in (SAMPLES, replace(SAMPLES, normalize="sampled"), replace(POLICY, ratio_cap=1.1),
                     replace(POLICY, clip_eps=0.1), LossSpec(divergence="forward")):  # fmt: skip
            spec = replace(spec, metrics=False)
            for a, b in zip(run(r, spec)[:2], reference.kl_rows(*r, spec)[:2], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_full_bucket_has_the_floor_of_fp32() -> None:
    """The whole mass on the support: what is left is 8 rounding errors, not 0, and its logarithm not -inf."""
    r = make_rows(8, 20, "top_k", pads=False, masked=False)
    r = r._replace(student=r.student.log_softmax(1) + 1e-6, teacher=r.teacher.log_softmax(1) - 0.1)
    for divergence in ("reverse", "forward"):
        spec = LossSpec(divergence=divergence, tail="bucket")
        for a, b in zip(run(r, spec)[:2], reference.kl_rows(*r, spec)[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_ids", [1, 7, 200])
def test_a_row_does_not_depend_on_the_batch_and_no_run_differs(num_ids: int) -> None:
    r = make_rows(ENTRIES // num_ids + 3, num_ids, "samples", pads=False, masked=False, proximal=True)
    spec = replace(POLICY, clip_eps=0.1, baseline="loo", normalize="sampled")
    whole = run(r, spec)
    assert all(a.equal(b) for a, b in zip(whole, run(r, spec), strict=True))
    for n in (0, len(r.ids) - 1):
        alone = run(Rows(*(None if t is None else t[n : n + 1] for t in r)), spec)
        assert alone[0].equal(whole[0][n : n + 1])
        assert alone[1].equal(whole[1][n : n + 1])


def test_masked_rows_and_pads_read_nothing() -> None:
    r = make_rows(9, 5, "samples")
    nothing = r._replace(student=torch.full_like(r.student, NAN), mask=torch.zeros(9, dtype=torch.bool))
    for spec in (SAMPLES, replace(POLICY, m2_budget=0.1, baseline="loo"), LossSpec(divergence="forward")):
        assert all((x == 0).all() for x in run(nothing, spec))
    coef = run(r, SAMPLES)[1]
    assert r.mask is not None
    assert (coef[(r.ids < 0) | ~r.mask[:, None]] == 0).all()


@pytest.mark.parametrize(("rows", "num_ids"), [(0, 4), (3, 0), (0, 0)])
def test_empty(rows: int, num_ids: int) -> None:
    r = Rows(*(torch.zeros(rows, num_ids) for _ in range(3)), torch.zeros(rows, num_ids, dtype=torch.int64), None, None)
    for spec in (SAMPLES, LossSpec(tail="bucket"), replace(POLICY, m2_budget=0.1)):
        losses, coef, metrics = run(r, spec)
        assert (losses.shape, coef.shape, metrics.shape) == ((rows,), (rows, num_ids), (len(LossMetrics._fields),))
        assert (losses == 0).all()
        assert (metrics == 0).all()


def test_metrics_are_not_made_unless_asked_for() -> None:
    r = make_rows(11, 20, "samples")
    with_metrics, without = run(r, SAMPLES), run(r, replace(SAMPLES, metrics=False))
    assert without[2].shape == (0,)
    assert all(a.equal(b) for a, b in zip(with_metrics[:2], without[:2], strict=True))


def test_refusals() -> None:
    samples, certain = make_rows(5, 20, "samples"), make_rows(5, 20, "top_k")
    if DEVICE == "cpu":  # what depends on the data cannot be refused on a device
        for tail in ("bucket", "renormalize"):
            with pytest.raises(ValueError, match=f"tail: got '{tail}' with a sampled support"):
                run(samples, LossSpec(tail=tail))
        with pytest.raises(ValueError, match="correction: needs the behaviour policy"):
            run(certain, LossSpec(needs_policy=True, ratio_cap=1.1))
    for wrong in (replace(SAMPLES, clip_eps=0.1), replace(POLICY, divergence="forward", advantage="behavior")):
        with pytest.raises(ValueError, match="expected reverse, 'drop' and a behaviour policy"):
            run(samples, wrong)
    with pytest.raises(ValueError, match=r"teacher: got shape \[5, 19\], expected \[5, 20\]"):
        run(samples._replace(teacher=samples.teacher[:, 1:]), SAMPLES)
    with pytest.raises(ValueError, match=r"mask: got shape \[4\], expected \[5\]"):
        run(samples._replace(mask=torch.ones(4)), SAMPLES)
    with pytest.raises(TypeError, match=r"ids: got torch\.int16"):
        run(samples._replace(ids=samples.ids.short()), SAMPLES)
    with pytest.raises(TypeError, match=r"student: got torch\.int64, expected floating point"):
        run(samples._replace(student=samples.ids), SAMPLES)
    with pytest.raises(ValueError, match=rf"ids: got shape \[5, {MAX_IDS + 1}\], expected .* K <= {MAX_IDS}"):
        run(samples._replace(ids=torch.zeros(5, MAX_IDS + 1, dtype=torch.int64)), SAMPLES)


def test_exponential_of_both_signs() -> None:
    """w q of a row of one, the coefficient of a forward KL: every exponent, the ends, and NaN."""
    x = torch.cat([torch.linspace(-86, 88.72, 3_001), torch.tensor([0.0, -0.0, 88.7228, 88.73, 89.0, 300.0, INF,
                                                                    -105.0, -1e30, -INF, NAN])])[:, None]  # fmt: skip
    zeros = torch.zeros_like(x)
    spec = LossSpec(divergence="forward", metrics=False)
    coef = -run(Rows(zeros, x, zeros, zeros.long(), None, None), spec)[1]
    expected = x.double().exp()
    inside = (x >= -86) & (x <= 88.7228)
    assert ((coef.double() - expected).abs() / expected)[inside].max() < 4e-7
    torch.testing.assert_close(coef[-8:], expected[-8:].float(), rtol=0, atol=1e-37, equal_nan=True)


def test_second_moment_threshold_is_exact() -> None:
    """The budget below, at and above the mean of the ratios' squares: what is spent is the budget."""
    generator = torch.Generator().manual_seed(3)
    for spread, share in itertools.product((0.0, 0.3, 5.0), (0.1, 0.999, 2.0)):
        log_ratio = 0.2 + spread * torch.rand(500, 1, generator=generator)
        log_mu = torch.full((500, 1), -7.0)
        student = log_mu + log_ratio
        r = Rows(student, student + 1.0, -log_mu, torch.zeros(500, 1, dtype=torch.int64), None, None)
        mean = float((student + r.log_weights).double().square().mean())
        losses = run(r, replace(POLICY, m2_budget=share * mean, metrics=False))[0].double()
        # The value of a clipped entry is that of the ratio at the threshold.
        ratio = torch.minimum((student + r.log_weights).double()[:, 0], (-losses).log())
        torch.testing.assert_close(float(ratio.square().mean()), min(share, 1.0) * mean, rtol=1e-5, atol=0)


def of_ratios(ratios: Tensor) -> Rows:
    """Rows of one sample each with these ratios p / mu."""
    student = ratios.log()[:, None]
    zeros = torch.zeros_like(student)
    return Rows(student, student, zeros, zeros.long(), None, None)


@pytest.mark.parametrize("count", [1, 99, 100, 101])
def test_the_percentile_counts_from_one(count: int) -> None:
    """Ratios of many exponents; and those that count as the largest, just as many as it takes and one fewer."""
    ratios = (8 * torch.randn(count, generator=torch.Generator().manual_seed(count))).exp()
    percentile = ratios.sort().values[count - count // 100 - 1]
    torch.testing.assert_close(run(of_ratios(ratios), SAMPLES)[2][5], percentile, rtol=0.004, atol=0)
    for special in (INF, NAN) if count > 1 else (INF, NAN, 0.0):
        ratios = torch.ones(count)
        ratios[: count // 100 + 1] = special
        expected = torch.tensor(special)
        torch.testing.assert_close(run(of_ratios(ratios), SAMPLES)[2][5], expected, rtol=0, atol=0, equal_nan=True)
        if count > 99:
            ratios[0] = 1.0
            torch.testing.assert_close(run(of_ratios(ratios), SAMPLES)[2][5], torch.tensor(1.0), rtol=0.004, atol=0)


def test_the_percentile_of_ratios_that_are_alike() -> None:
    """All of one exponent, and more than one program of either kernel has some."""
    ratios = 1 + torch.rand(FINE_BLOCK + 1, generator=torch.Generator().manual_seed(0))
    expected = ratios.sort().values[-(len(ratios) // 100) - 1]
    torch.testing.assert_close(run(of_ratios(ratios), SAMPLES)[2][5], expected, rtol=0.004, atol=0)


def test_sums_of_more_programs_than_a_block() -> None:
    """Means over rows and over draws, without the rounding of a plain sum."""
    programs = 2 * REDUCE_BLOCK + 7
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(SUMS, programs, generator=generator)
    sums[3, 0], sums[3, 2 * REDUCE_BLOCK] = 1e8, -1e8  # of one lane, whose third number is lost between them
    sums[5] = torch.randint(0, 9, (programs,), generator=generator).float()
    histogram = torch.zeros(COARSE + FINE, dtype=torch.int64)
    histogram[130] = 1000
    bins = torch.full((101, 11), -1, dtype=torch.int16)
    bins[:100, :10] = 130 * 128 + 77
    bins[100] = 131 * 128 + 3  # another exponent
    tensors = [x.to(DEVICE) for x in (sums, bins, histogram, torch.empty(SUMS))]
    launch_metrics(*tensors)
    got = tensors[3].cpu().double()
    wide = sums.double().sum(1)
    expected = torch.cat([wide[:4] / wide[5], wide[4:5] / 1000, torch.zeros(1).double(), wide[6:] / 1000])
    scale = sums.double().abs().masked_fill(sums.abs() == 1e8, 0.0).sum(1) / torch.tensor(
        [*[float(wide[5])] * 4, 1000.0, 1.0, 1000.0]
    )
    error = ((got - expected).abs() / scale)[[0, 1, 2, 3, 4, 6]]
    assert error.max() < 3e-7
    assert tensors[2][COARSE:].nonzero().tolist() == [[77]]
    assert tensors[2][COARSE + 77] == 1000
    # Eight bits of exponent and seven below: 2^3 (1 + 77.5 / 128).
    assert got[5] == math.ldexp(1 + 77.5 / 128, 130 - 127)


def test_a_row_of_the_largest_block() -> None:
    r = make_rows(2, MAX_IDS, "samples", masked=False)
    spec = replace(SAMPLES, baseline="loo", normalize="sampled")
    assert_matches(r, spec, run(r, spec))
    assert expected_of(r, spec)[1].abs().max() > 1e-6
