"""Rows of reverse KL as a score function, tail "drop": c = omega (A - b), omega = w p or its corrected form.

The formulas are those of asyncopd/backends/reference/kl.py. Blocks are [rows, K]; what belongs to a row is [rows, 1].
Where there is no entry log w = log p = -inf and log q = 0.
"""

import triton
import triton.language as tl

from asyncopd.kernels.kl_divergence import log_ratio_or_zero, product_or_zero, row_sum
from asyncopd.kernels.numeric import INF, exp_precise


@triton.jit
def behaviour_logprobs(log_w, valid):
    """log mu = -log M - log w, M the row's number of entries; 0 where there is none."""
    return tl.where(valid, -tl.log(row_sum(valid.to(tl.float32))) - log_w, 0.0)


@triton.jit
def advantage(log_p, log_q, log_mu, valid, BEHAVIOUR: tl.constexpr):
    """A = log p - log q, or that of the behaviour policy; +inf where the teacher has no mass."""
    if BEHAVIOUR:
        log_p = tl.where(valid, log_mu, -INF)
    return log_ratio_or_zero(log_p, log_q)


@triton.jit
def corrected_log_weight(
    log_w,  # [rows, K] fp32
    log_p,  # [rows, K] fp32
    log_mu,  # [rows, K] fp32
    proximal,  # [rows, K] fp32 log p_prox, or anything
    log_cap,
    log_proximal_cap,
    HAS_CAP: tl.constexpr,
    HAS_PROXIMAL: tl.constexpr,
):
    """log omega, and where it is not log w p: min(p/mu, cap) / M; 0 where p_prox/mu is above its cap."""
    log_omega = log_w + log_p
    changed = tl.zeros_like(log_omega) != 0.0
    if HAS_CAP:
        limit = log_cap + log_w + log_mu
        changed |= log_omega > limit
        # The smaller one; NaN if either is.
        log_omega = tl.where((log_omega <= limit) | (log_omega != log_omega), log_omega, limit)
    if HAS_PROXIMAL:
        dropped = proximal - log_mu > log_proximal_cap
        changed |= dropped & (log_omega > -INF)
        log_omega = tl.where(dropped, -INF, log_omega)
    return log_omega, changed


@triton.jit
def baseline(
    omega,  # [rows, K] fp32, 0 where A is infinite
    signal,  # [rows, K] fp32, likewise
    valid,  # [rows, K] bool
    drawn,  # [rows, K] bool
    KIND: tl.constexpr,  # "mean" or "loo"
):
    """b: the weighted mean of A [rows, 1]; or for each draw the estimate of E_p[A] that leaves this draw out."""
    terms = omega * signal
    if KIND == "mean":
        total = row_sum(omega)
        b = tl.where(total > 0.0, row_sum(terms) / total, 0.0)
    else:
        is_drawn = drawn.to(tl.float32)
        count = row_sum(is_drawn)
        # Products, so that a term that is no number spoils both sums, as it should.
        others = row_sum(terms * is_drawn) - terms
        left_out = row_sum(terms * (1.0 - is_drawn)) + others * (count / tl.maximum(count - 1.0, 1.0))
        b = tl.where(drawn, left_out, row_sum(terms))
        # A single draw has no others to estimate from.
        b = tl.where(count == 1.0, 0.0, b)
    return b


@triton.jit
def clip(
    omega,  # [rows, K] fp32
    centred,  # [rows, K] fp32
    log_ratio,  # [rows, K] fp32
    low,
    high,
):
    """(omega in the value, omega in the gradient, where it binds): the ratio went where its advantage points."""
    binds = ((centred < 0.0) & (log_ratio > high)) | ((centred > 0.0) & (log_ratio < low))
    bound = tl.where(log_ratio > high, high, low)
    value = tl.where(binds, omega * exp_precise(bound - log_ratio), omega)
    return value, tl.where(binds, 0.0, omega), binds


@triton.jit
def score(
    value,  # [rows, K] fp32: what weighs an entry in the loss
    omega,  # [rows, K] fp32: and in the gradient
    signal,  # [rows, K] fp32
    centred,  # [rows, K] fp32
    weight,  # [rows, K] fp32: w p
    valid,  # [rows, K] bool
    NORMALIZE: tl.constexpr,
):
    """Losses [rows, 1] and coefficients."""
    loss = row_sum(product_or_zero(value, signal))
    coef = tl.where(valid, omega * centred, 0.0)
    if NORMALIZE == "sampled":
        # The normaliser is a function of the same logits: d log p_i = dz_i - sum_j w_j p_j dz_j.
        coef = tl.where(valid, coef - row_sum(coef) * weight, 0.0)
    return loss, coef
