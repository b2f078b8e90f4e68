"""The losses in fp64, written straight from the formulas of the design: dense ones, and loops over single entries."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from asyncopd import Support

Row = Sequence[float]


# ------------------------------------------------------------------------------------------ the whole vocabulary


def dense_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    z = hidden @ weight.t()
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def dense_reverse(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[N, V] twice -> KL(p || q) of each row."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def dense_forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(1)


def reverse_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    """d KL(p || q) / dz, [N, V]: p (A - E_p[A])."""
    p, signal = log_p.exp(), log_p - log_q
    return p * (signal - (p * signal).sum(-1, keepdim=True))


# --------------------------------------------------------------------------------------------------- one support


@dataclass
class Options:
    """The options of a loss, and which entries were not drawn (the head of head + tail)."""

    normalize: str = "exact"
    tail: str = "drop"
    baseline: str = "none"
    certain: Callable[[float], bool] = field(default=lambda log_w: log_w == 0)
    advantage: str = "current"
    ratio_cap: float | None = None
    clip: tuple[float, float] | None = None  # bounds of the ratio
    proximal_cap: float | None = None


def reverse_row(
    log_p: Row, log_q: Row, log_w: Row, ids: Sequence[int], options: Options | None = None, proximal: Row | None = None
) -> tuple[float, list[float]]:
    """Value and coefficients c (the derivative by log_p, or by the logit if normalised over the sample) of one row."""
    o = options or Options()
    valid = [i for i, token in enumerate(ids) if token >= 0]
    coef = [0.0] * len(ids)
    if not valid:
        return 0.0, coef
    lp = {i: log_p[i] for i in valid}
    if o.tail != "drop":
        return _divergence(lp, {i: log_q[i] for i in valid}, o.tail, coef)
    w = {i: math.exp(log_w[i]) for i in valid}
    if o.normalize == "sampled":
        z = math.log(sum(w[i] * math.exp(lp[i]) for i in valid))
        lp = {i: lp[i] - z for i in valid}
    p = {i: math.exp(lp[i]) for i in valid}
    count = len(valid)
    mu = {i: 1 / (count * w[i]) for i in valid}
    signal = {i: (math.log(mu[i]) if o.advantage == "behavior" else lp[i]) - log_q[i] if p[i] else 0.0 for i in valid}
    omega = {}
    for i in valid:
        ratio = p[i] / mu[i]
        if o.ratio_cap is not None:
            ratio = min(ratio, o.ratio_cap)
        if proximal is not None and math.exp(proximal[i]) / mu[i] > (o.proximal_cap or math.inf):
            ratio = 0.0
        omega[i] = ratio / count
    value = 0.0
    for i in valid:
        centred = signal[i] - _baseline(o, i, valid, omega, signal, log_w)
        step, slope = omega[i], omega[i]
        if o.clip is not None and p[i]:
            anchor = math.exp(proximal[i]) if proximal is not None else mu[i]
            ratio = p[i] / anchor
            clipped = min(max(ratio, o.clip[0]), o.clip[1])
            # PPO maximises min(r adv, clip(r) adv) with adv = -(A - b).
            if -centred * clipped < -centred * ratio:
                step, slope = omega[i] * clipped / ratio, 0.0
        value += step * signal[i] if step else 0.0
        coef[i] = slope * centred if math.isfinite(signal[i]) else 0.0
    if o.normalize == "sampled":
        total = sum(coef)
        for i in valid:
            coef[i] -= total * w[i] * p[i]
    return value, coef


def _baseline(
    o: Options, i: int, valid: list[int], omega: dict[int, float], signal: dict[int, float], log_w: Row
) -> float:
    finite = [j for j in valid if math.isfinite(signal[j])]
    if o.baseline == "none":
        return 0.0
    if o.baseline == "mean":
        total = sum(omega[j] for j in finite)
        return sum(omega[j] * signal[j] for j in finite) / total if total else 0.0
    drawn = [j for j in valid if not o.certain(log_w[j])]
    if len(drawn) == 1:
        return 0.0
    fixed = sum(omega[j] * signal[j] for j in finite if j not in drawn)
    if i not in drawn:
        return fixed + sum(omega[j] * signal[j] for j in finite if j in drawn)
    others = sum(omega[j] * signal[j] for j in finite if j in drawn and j != i)
    return fixed + others * len(drawn) / (len(drawn) - 1)


def _divergence(lp: dict[int, float], lq: dict[int, float], tail: str, coef: list[float]) -> tuple[float, list[float]]:
    p, q = ({i: math.exp(x) for i, x in side.items()} for side in (lp, lq))
    mass_p, mass_q = sum(p.values()), sum(q.values())
    if tail == "bucket":
        rest = math.log((1 - mass_p) / (1 - mass_q))
        for i in p:
            coef[i] = p[i] * (lp[i] - lq[i] - rest)
        return sum(p[i] * (lp[i] - lq[i]) for i in p) + (1 - mass_p) * rest, coef
    value = sum(p[i] / mass_p * math.log(p[i] / mass_p * mass_q / q[i]) for i in p)
    for i in p:
        coef[i] = p[i] / mass_p * (math.log(p[i] / mass_p * mass_q / q[i]) - value)
    return value, coef


def forward_row(
    log_p: Row, log_q: Row, log_w: Row, ids: Sequence[int], tail: str = "drop"
) -> tuple[float, list[float]]:
    valid = [i for i, token in enumerate(ids) if token >= 0]
    coef = [0.0] * len(ids)
    if not valid:
        return 0.0, coef
    p, q, w = ({i: math.exp(x[i]) for i in valid} for x in (log_p, log_q, log_w))
    mass_p, mass_q = sum(p.values()), sum(q.values())
    if tail == "renormalize":
        p, q = {i: p[i] / mass_p for i in p}, {i: q[i] / mass_q for i in q}
    value = sum(w[i] * q[i] * math.log(q[i] / p[i]) if p[i] else w[i] * q[i] * math.inf for i in valid if q[i])
    for i in valid:
        coef[i] = -w[i] * q[i] if p[i] else 0.0
        if tail == "renormalize":
            coef[i] += p[i]
        elif tail == "bucket":
            coef[i] += p[i] * (1 - mass_q) / (1 - mass_p)
    if tail == "bucket":
        value += (1 - mass_q) * math.log((1 - mass_q) / (1 - mass_p))
    return value, coef


def metrics_of(
    student: Tensor, support: Support, coef: Tensor, options: Options | None = None, mask: Tensor | None = None
) -> dict[str, float]:
    """What LossMetrics holds, but for the clip's share, entry by entry in fp64."""
    o = options or Options()
    masses, teacher, sizes, sums, ratios = ([] for _ in range(5))  # type: tuple[list[float], ...]
    for n, ids in enumerate(support.ids.tolist()):
        valid = [k for k, token in enumerate(ids) if token >= 0 and (mask is None or mask[n])]
        if not valid:
            continue
        w = {k: math.exp(support.log_weights[n, k].double().item()) for k in valid}
        wp = {k: w[k] * math.exp(student[n, k].double().item()) for k in valid}
        if o.normalize == "sampled":
            wp = {k: x / sum(wp.values()) for k, x in wp.items()}
        masses.append(sum(wp.values()))
        teacher.append(sum(w[k] * math.exp(support.teacher_logprobs[n, k].double().item()) for k in valid))
        sizes.append(masses[-1] ** 2 / sum(x * x for x in wp.values()) if masses[-1] else 0.0)
        sums.append(float(coef[n].double().sum()))
        drawn = [k for k in valid if not o.certain(support.log_weights[n, k].item())]
        ratios += [len(drawn) * wp[k] for k in drawn]
    rank = next((r for r in range(1, len(ratios) + 1) if 100 * r >= 99 * len(ratios)), 0)
    columns = {"student_mass": masses, "teacher_mass": teacher, "ess": sizes, "coef_sum": sums, "ratio_mean": ratios}
    means = {name: sum(values) / len(values) if values else 0.0 for name, values in columns.items()}
    return {**means, "ratio_p99": sorted(ratios)[rank - 1] if ratios else 0.0}


def rows_of(
    loss: Callable[..., tuple[float, list[float]]], student: Tensor, support: Support, *args: object
) -> tuple[Tensor, Tensor]:
    """`loss` row by row: values [N] and coefficients [N, K] in fp64."""
    columns = (student.double(), support.teacher_logprobs.double(), support.log_weights.double(), support.ids)
    out = [loss(*(c[n].tolist() for c in columns), *args) for n in range(student.shape[0])]
    values = torch.tensor([value for value, _ in out], dtype=torch.float64)
    return values, torch.tensor([c for _, c in out], dtype=torch.float64).reshape(student.shape)


def dz_of(coef: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
    """scatter(c at ids) - (sum c) softmax(z), [N, V], entry by entry."""
    dz = -coef.sum(1, keepdim=True) * log_p.exp()
    for n, k in product(range(ids.shape[0]), range(ids.shape[1])):
        if ids[n, k] >= 0:
            dz[n, ids[n, k]] += coef[n, k]
    return dz
