"""Both divergences on [N, K] log-probabilities: value of each row, and coefficients c that are its gradient.

    reverse   R = sum_i w_i p_i A_i,  A_i = log p_i - log q_i      c_i = w_i p_i (A_i - b)
    forward   F = sum_i w_i q_i (log q_i - log p_i)                c_i = -w_i q_i

The gradient of a row is sum_i c_i grad log p_i.

For truncated supports with a tail the losses are true divergences (P, Q the masses on the support):
    bucket        + P' log(P'/Q'), P' = 1 - P        c_i = p_i (A_i - A')           A' = log P' - log Q'
    renormalize   p/P and q/Q in place of p and q    c_i = p_i/P (A_i - log P/Q - loss)
An id may occur several times: each occurrence is a term of its own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.backends.loss_spec import LossSpec, no_policy_error, sampled_support_error
from asyncopd.backends.reference.kl_metrics import loss_metrics
from asyncopd.backends.reference.rows import compute_dtype


@dataclass(slots=True)
class _Terms:
    """One support's rows, [N, K] each, with pads and masked rows made harmless."""

    valid: Tensor  # bool
    log_w: Tensor  # -inf where not valid
    log_p: Tensor  # -inf where not valid
    log_q: Tensor  # 0 where not valid


def _terms(student: Tensor, teacher: Tensor, log_weights: Tensor, ids: Tensor, mask: Tensor | None) -> _Terms:
    dtype = compute_dtype(student, teacher)
    valid = ids >= 0
    if mask is not None:
        valid = valid & mask[:, None]
    return _Terms(
        valid,
        log_weights.to(dtype).masked_fill(~valid, -torch.inf),
        student.to(dtype).masked_fill(~valid, -torch.inf),
        teacher.to(dtype).masked_fill(~valid, 0.0),
    )


def _sum(x: Tensor) -> Tensor:
    return x.sum(dim=1, keepdim=True)


def _log_mass(log_p: Tensor) -> Tensor:
    return torch.logsumexp(log_p, dim=1, keepdim=True)


def _log_rest(log_p: Tensor) -> Tensor:
    """log(1 - sum p) [N, 1], with a floor of 8 eps for 1 - sum p.

    Log-probabilities whose LSE is right to 2 eps, as a device's exponentials give it, have a sum that differs from 1 by
    up to 4 eps although the support is the whole vocabulary. Nothing is known of a rest of that size; a ratio of two
    such rests would be arbitrary, and with the same floor on both sides it is 1.
    """
    floor = 8 * torch.finfo(log_p.dtype).eps
    return torch.log((-torch.expm1(_log_mass(log_p))).clamp(min=floor))


def _log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a - log b, 0 where a has no mass: such an outcome contributes nothing, whatever b says."""
    return (log_a - log_b).masked_fill(log_a == -torch.inf, 0.0)


def kl_rows(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], coefficients [N, K] by `student` (logits if normalize is "sampled"), values of a LossMetrics."""
    t = _terms(student, teacher, log_weights, ids, mask)
    if student.device.type == "cpu":
        check_weights(t.valid, t.log_w, spec)
    changed = torch.zeros_like(t.valid)
    if spec.divergence == "forward":
        loss, coef = _forward_kl(t, spec.tail)
    elif spec.tail != "drop":
        loss, coef = _true_reverse_kl(t, spec.tail)
    else:
        if spec.normalize == "sampled":
            log_z = _log_mass(t.log_w + t.log_p)
            t.log_p = (t.log_p - log_z).masked_fill(t.log_p == -torch.inf, -torch.inf)
        loss, coef, changed = _reverse_kl(t, proximal, spec)
    if not spec.metrics:
        return loss.squeeze(1), coef, loss.new_empty(0)
    drawn = _drawn(t, spec.head_is_certain)
    return loss.squeeze(1), coef, loss_metrics(t.valid, t.log_w, t.log_p, t.log_q, coef, changed, drawn)


def _drawn(t: _Terms, head_is_certain: bool) -> Tensor:
    return t.valid & (t.log_w != 0) if head_is_certain else t.valid


def _reverse_kl(t: _Terms, proximal: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N, 1], coefficients, and where a correction changed the gradient."""
    log_mu = None
    if spec.needs_policy:
        log_mu = (-torch.log(_sum(t.valid).to(t.log_w.dtype)) - t.log_w).masked_fill(~t.valid, 0.0)
    signal = _log_ratio(t.log_p if spec.advantage == "current" else _behaviour(log_mu, t), t.log_q)
    # Where the teacher has no mass the divergence is infinite; the value says so, the gradient leaves the term out.
    infinite = signal == torch.inf
    omega, changed = _weights(t, log_mu, proximal, spec)
    changed &= ~infinite
    centred = signal.masked_fill(infinite, 0.0)
    b = _baseline(spec.baseline, omega.masked_fill(infinite, 0.0), centred, t, spec.head_is_certain)
    centred = (centred - b).masked_fill(infinite, 0.0)

    value = omega
    if spec.clip_eps is not None or spec.m2_budget is not None:
        old = log_mu if proximal is None else proximal.to(t.log_p.dtype)
        assert old is not None
        log_ratio = _log_ratio(t.log_p, old)
        log_ratio = log_ratio.masked_fill(~t.valid, 0.0)
        low, high = _clip_bounds(spec, log_ratio, centred, t.valid)
        # A loss falls as its advantage -(A - b) is followed; the clip binds where the ratio already went that way.
        binds = ((centred < 0) & (log_ratio > high)) | ((centred > 0) & (log_ratio < low))
        clipped = log_ratio.clamp(min=low).clamp(max=high)
        value = torch.where(binds, omega * torch.exp(clipped - log_ratio), omega)
        omega = omega.masked_fill(binds, 0.0)
        changed |= binds

    loss = _sum((value * signal).masked_fill(value == 0, 0.0))
    coef = omega * centred
    if spec.normalize == "sampled":
        # The normaliser is a function of the same logits: d log p_i = dz_i - sum_j w_j p_j dz_j.
        coef = coef - _sum(coef) * torch.exp(t.log_w + t.log_p)
    return loss, coef.masked_fill(~t.valid, 0.0), changed


def _behaviour(log_mu: Tensor | None, t: _Terms) -> Tensor:
    assert log_mu is not None
    return log_mu.masked_fill(~t.valid, -torch.inf)


def _weights(t: _Terms, log_mu: Tensor | None, proximal: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """w p and where it was corrected: to min(p/mu, cap)/M; to 0 where p_prox/mu is above its cap, else p/mu / M."""
    log_omega = t.log_w + t.log_p
    changed = torch.zeros_like(t.valid)
    if spec.ratio_cap is not None:
        assert log_mu is not None
        limit = math.log(spec.ratio_cap) + t.log_w + log_mu
        changed |= log_omega > limit
        log_omega = torch.minimum(log_omega, limit)
    if proximal is not None:
        assert log_mu is not None
        dropped = proximal.to(log_mu.dtype) - log_mu > math.log(spec.proximal_cap)
        changed |= dropped & (log_omega > -torch.inf)
        log_omega = log_omega.masked_fill(dropped, -torch.inf)
    return torch.exp(log_omega).masked_fill(~t.valid, 0.0), changed & t.valid


def _baseline(kind: str, omega: Tensor, signal: Tensor, t: _Terms, head_is_certain: bool) -> Tensor:
    """b: 0; the weighted mean of A; or for each draw the estimate of E_p[A] that leaves this draw out.

    The last is unbiased because a draw is independent of its own baseline, and the certain entries' baseline has the
    same expectation: sum over the certain ones + M/(M-1) times the sum over the other draws.
    """
    if kind == "none":
        return torch.zeros_like(omega)
    terms = omega * signal
    if kind == "mean":
        total = _sum(omega)
        return torch.where(total > 0, _sum(terms) / total, 0.0)
    drawn = _drawn(t, head_is_certain)
    count = _sum(drawn).to(omega.dtype)
    others = _sum(terms * drawn) - terms
    leave_one_out = _sum(terms * ~drawn) + others * (count / (count - 1).clamp(min=1))
    # A single draw has no others to estimate from.
    return torch.where(drawn, leave_one_out, _sum(terms)).masked_fill(count == 1, 0.0)


def _clip_bounds(
    spec: LossSpec, log_ratio: Tensor, centred: Tensor, valid: Tensor
) -> tuple[Tensor | float, Tensor | float]:
    """Bounds of the log-ratio: PPO's fixed log(1 -+ eps), or M2PO's +-tau that spends the second-moment budget."""
    if spec.clip_eps is not None:
        return math.log1p(-spec.clip_eps) if spec.clip_eps < 1 else -math.inf, math.log1p(spec.clip_eps)
    assert spec.m2_budget is not None
    bindable = valid & (((centred < 0) & (log_ratio > 0)) | ((centred > 0) & (log_ratio < 0)))
    tau = second_moment_threshold(log_ratio, bindable, spec.m2_budget)
    return -tau, tau


def second_moment_threshold(log_ratio: Tensor, bindable: Tensor, budget: float) -> Tensor:
    """tau with mean over the bindable entries of min(log_ratio^2, tau^2) = budget; inf where the mean is below it.

    M2PO (arXiv 2510.01161). f(t) = sum_i min(d_i, t) is increasing, so with d sorted ascending and the k smallest below
    t, t = (n budget - cumsum_k) / (n - k) for the first k whose t does not reach past d_k: one sort, one sum.
    """
    d = (log_ratio * log_ratio).masked_fill(~bindable, torch.inf).flatten().sort().values
    n = bindable.sum()
    rank = torch.arange(d.numel(), device=d.device)
    inside = rank < n
    d0 = d.masked_fill(~inside, 0.0)
    before = d0.cumsum(0) - d0
    t = (n.to(d.dtype) * budget - before) / (n - rank).clamp(min=1)
    # The first that is reached; none if the budget is not exhausted. (An index tensor would be read back: .item().)
    reached = inside & (t <= d)
    first = reached & (reached.cumsum(0) == 1)
    tau_squared = torch.where(first, t, 0.0).sum().clamp(min=0)
    return torch.where(reached.any(), tau_squared, torch.inf).sqrt()


def check_weights(valid: Tensor, log_weights: Tensor, spec: LossSpec) -> None:
    """Refuse supports that the options cannot be applied to. Reads the data, so on a CPU only (see `Support.draw`)."""
    certain = valid & (log_weights == 0)
    if spec.tail != "drop" and bool((valid & ~certain).any()):
        raise sampled_support_error(spec.tail)
    if not (spec.needs_policy and spec.head_is_certain):
        return
    used = valid.any(dim=1)
    if bool(used.any()) and bool(certain.any(dim=1)[used].all()):
        raise no_policy_error()


def _true_reverse_kl(t: _Terms, tail: str) -> tuple[Tensor, Tensor]:
    # Pads have log q = 0, which must not count as mass.
    log_q = t.log_q.masked_fill(~t.valid, -torch.inf)
    if tail == "bucket":
        p, signal = torch.exp(t.log_p), _log_ratio(t.log_p, log_q)
        log_rest = _log_rest(t.log_p)
        rest_signal = log_rest - _log_rest(log_q)
        rest = torch.exp(log_rest) * rest_signal
        pull = rest_signal
    else:
        log_mass = _log_mass(t.log_p)
        p = torch.exp(t.log_p - log_mass).masked_fill(t.log_p == -torch.inf, 0.0)
        signal = _log_ratio(t.log_p, log_q) - (log_mass - _log_mass(log_q))
        rest = torch.zeros_like(log_mass)
        # Over what has a gradient, so that the coefficients sum to 0 whatever is left out.
        kept = p.masked_fill(signal == torch.inf, 0.0)
        pull = _sum((kept * signal).masked_fill(kept == 0, 0.0)) / _sum(kept).clamp(min=torch.finfo(p.dtype).tiny)
    loss = _sum((p * signal).masked_fill(p == 0, 0.0)) + rest
    coef = p * (signal - pull)
    used = t.valid.any(dim=1, keepdim=True)
    return loss.masked_fill(~used, 0.0), coef.masked_fill((p == 0) | ~t.valid | (signal == torch.inf), 0.0)


def _forward_kl(t: _Terms, tail: str) -> tuple[Tensor, Tensor]:
    log_p = t.log_p
    log_q = t.log_q.masked_fill(~t.valid, -torch.inf)
    rest: Tensor | float = 0.0
    if tail == "drop":
        omega = torch.exp(t.log_w + log_q)
        coef = -omega
    elif tail == "bucket":
        omega = torch.exp(log_q)
        log_rest_p, log_rest_q = _log_rest(log_p), _log_rest(log_q)
        rest = torch.exp(log_rest_q) * (log_rest_q - log_rest_p)
        coef = torch.exp(log_p + log_rest_q - log_rest_p) - omega
    else:
        log_p = (log_p - _log_mass(log_p)).masked_fill(log_p == -torch.inf, -torch.inf)
        log_q = (log_q - _log_mass(log_q)).masked_fill(log_q == -torch.inf, -torch.inf)
        omega = torch.exp(log_q)
        # The teacher's share of what the student can reach: the coefficients sum to 0 whatever is left out.
        kept = omega.masked_fill(log_p == -torch.inf, 0.0)
        coef = torch.exp(log_p) - kept / _sum(kept).clamp(min=torch.finfo(omega.dtype).tiny)
    loss = _sum((omega * _log_ratio(log_q, log_p)).masked_fill(omega == 0, 0.0)) + rest
    used = t.valid.any(dim=1, keepdim=True)
    impossible = t.log_p == -torch.inf  # a probability of 0 has no gradient to follow; pads and masked rows too
    return loss.masked_fill(~used, 0.0), coef.masked_fill(impossible, 0.0)
