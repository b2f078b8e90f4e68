"""Supports for the [N, K] loss kernels, their options, and the comparison with the reference in fp64."""

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from asyncopd.backends.loss_spec import LossMetrics, LossSpec
from asyncopd.backends.reference import kl as reference

INF, NAN = math.inf, math.nan


class Rows(NamedTuple):
    """The tensors of one call, in its order."""

    student: Tensor
    teacher: Tensor
    log_weights: Tensor
    ids: Tensor
    mask: Tensor | None
    proximal: Tensor | None


def make_rows(
    rows: int, num_ids: int, draw: str, *, pads: bool = True, masked: bool = True, proximal: bool = False
) -> Rows:
    """Supports that look real: masses below 1 in total, weights of a stale policy, pads, masked rows, an empty row."""
    rng = torch.Generator().manual_seed(1000 * rows + num_ids)
    z = 1.5 * torch.randn(3, rows, num_ids + 3, generator=rng)
    log_p, log_q, log_mu = ((z[0] + noise).log_softmax(1)[:, :num_ids] for noise in (0.0, z[1], 0.4 * z[2]))
    ids = torch.randint(0, 1000, (rows, num_ids), generator=rng)
    log_w = -math.log(num_ids) - log_mu
    if draw == "top_k":
        log_w = torch.zeros_like(log_w)
    elif draw == "head_tail":
        log_w[:, : num_ids // 3] = 0.0
    if pads:
        pad = torch.rand(rows, num_ids, generator=rng) < 0.2
        ids[pad] = -1
        log_w, log_q = log_w.masked_fill(pad, -INF), log_q.masked_fill(pad, -INF)
        log_p = log_p.masked_fill(pad, NAN)  # may be anything
        ids[rows // 2 : rows // 2 + 1] = -1
    mask = torch.rand(rows, generator=rng) < 0.7 if masked else None
    anchor = log_p + 0.3 * torch.randn(rows, num_ids, generator=rng)
    return Rows(log_p, log_q, log_w, ids, mask, anchor if proximal else None)


def expected_of(r: Rows, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in r]
    return reference.kl_rows(*wide, spec)  # type: ignore[arg-type]


def assert_matches(r: Rows, spec: LossSpec, actual: tuple[Tensor, Tensor, Tensor], tolerance: float = 2e-6) -> None:
    """Fail unless these are the row losses, coefficients and metrics of the reference in fp64, to fp32's rounding."""
    expected = expected_of(r, spec)
    losses, coef, _ = expected
    # The terms that a loss and its coefficients are sums and differences of.
    kept = (r.ids >= 0).double() if r.mask is None else (r.ids >= 0).double() * r.mask[:, None]
    log_p, log_q, log_w = (t.double().masked_fill(kept == 0, -INF) for t in r[:3])
    if spec.normalize == "sampled":
        log_p = log_p - (log_p + log_w).logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)
    size = ((log_w + log_p).exp() + (log_w + log_q).exp()).nan_to_num(posinf=0.0)
    logs = sum(t.abs().nan_to_num(posinf=0.0, neginf=0.0).amax(1) if t.numel() else 0.0 for t in (log_p, log_q, log_w))
    scale = 1.0 + size.sum(1) * (1.0 + logs)
    assert actual[0].dtype == actual[1].dtype == actual[2].dtype == torch.float32
    for got, want, by in ((actual[0], losses, scale), (actual[1], coef, scale[:, None])):
        same = (got.double() == want) | (got.isnan() & want.isnan())
        error = ((got.double() - want).abs() / by).masked_fill(same, 0.0)
        assert (error <= tolerance).all(), (float(error.max()), spec)
    names = LossMetrics._fields if spec.metrics else ()
    for name, got, want in zip(names, actual[2].double(), expected[2], strict=True):
        rtol = 0.005 if name == "ratio_p99" else 1e-5
        atol = 2e-5 if name == "coef_sum" else 1e-7
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


SAMPLES = LossSpec(head_is_certain=False)
CORRECTIONS = [
    {},
    {"needs_policy": True, "advantage": "behavior"},
    {"needs_policy": True, "ratio_cap": 1.1},
    {"needs_policy": True, "clip_eps": 0.15},
    {"needs_policy": True, "clip_eps": 1.5, "advantage": "behavior"},
    {"needs_policy": True, "m2_budget": 0.02},
    {"needs_policy": True, "m2_budget": 100.0},
]
SAMPLED = [
    replace(SAMPLES, normalize=normalize, baseline=baseline, **correction)
    for normalize, baseline, correction in itertools.product(("exact", "sampled"), ("none", "mean", "loo"), CORRECTIONS)
]
TRUE = [LossSpec(divergence=d, tail=tail) for d in ("reverse", "forward") for tail in ("bucket", "renormalize")]


def binds_by_rounding(spec: LossSpec) -> bool:
    """The mean of one entry is the entry, and its share of itself is 1: an advantage or a log-ratio that is 0 but for
    rounding, whose sign says whether a clip can bind. Such options are compared on rows of several entries."""
    clips = spec.clip_eps is not None or spec.m2_budget is not None
    return clips and (spec.baseline == "mean" or spec.normalize == "sampled")
