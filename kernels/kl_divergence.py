"""Rows of the true divergences: forward KL, and reverse KL over a truncated support with its tail.

The formulas are those of asyncopd/backends/reference/kl.py. Blocks are [rows, K]; what belongs to a row is [rows, 1].
Where there is no entry log w = log p = -inf and log q = 0; no row without entries needs a case of its own, because all
its terms are 0.
"""

import triton
import triton.language as tl

from asyncopd.kernels.numeric import INF, exp_precise

# Floor of 1 - mass: 8 eps, as in the reference. What is below is rounding of the log-probabilities.
FLOOR = tl.constexpr(2.0**-20)
TINY = tl.constexpr(2.0**-126)


@triton.jit
def row_sum(x):  # [rows, K] -> [rows, 1]
    return tl.sum(x, axis=1)[:, None]


@triton.jit
def at_least(x, low):
    """max(x, low) that keeps a NaN."""
    return tl.where(x < low, low, x)


@triton.jit
def product_or_zero(a, b):
    """a b, and 0 where a is 0, whatever b is."""
    return tl.where(a == 0.0, 0.0, a * b)


@triton.jit
def log_ratio_or_zero(log_a, log_b):
    """log a - log b, 0 where a has no mass: such an outcome contributes nothing, whatever b says."""
    return tl.where(log_a == -INF, 0.0, log_a - log_b)


@triton.jit
def log_mass(x):  # [rows, K] -> [rows, 1]
    """log sum exp of each row; -inf for a row without mass."""
    top = tl.max(x, axis=1)[:, None]
    origin = tl.where(tl.abs(top) == INF, 0.0, top)
    return origin + tl.log(row_sum(exp_precise(x - origin)))


@triton.jit
def less(x, log_z):
    """x - log z, and -inf where x is, whatever z."""
    return tl.where(x == -INF, -INF, x - log_z)


@triton.jit
def rest_of(log_p):  # [rows, K]
    """1 - sum p and its logarithm. Not by way of the logarithm of the sum, which would round twice."""
    rest = at_least(1.0 - row_sum(exp_precise(log_p)), FLOOR)
    return rest, tl.log(rest)


@triton.jit
def forward_rows(
    log_w,  # [rows, K] fp32
    log_p,  # [rows, K] fp32
    log_q,  # [rows, K] fp32
    valid,  # [rows, K] bool
    TAIL: tl.constexpr,
):
    """Losses [rows, 1] and coefficients of F = sum w q (log q - log p)."""
    # A probability of 0 has no gradient to follow; where there is no entry it is 0 too.
    impossible = log_p == -INF
    log_q = tl.where(valid, log_q, -INF)
    if TAIL == "drop":
        omega = exp_precise(log_w + log_q)
        coef = -omega
    elif TAIL == "bucket":
        omega = exp_precise(log_q)
        _, log_rest_p = rest_of(log_p)
        rest_q, log_rest_q = rest_of(log_q)
        coef = exp_precise(log_p + (log_rest_q - log_rest_p)) - omega
    else:
        log_p = less(log_p, log_mass(log_p))
        log_q = less(log_q, log_mass(log_q))
        omega = exp_precise(log_q)
        # The teacher's share of what the student can reach: the coefficients sum to 0 whatever is left out.
        kept = tl.where(log_p == -INF, 0.0, omega)
        coef = exp_precise(log_p) - kept / at_least(row_sum(kept), TINY)
    loss = row_sum(product_or_zero(omega, log_ratio_or_zero(log_q, log_p)))
    if TAIL == "bucket":
        loss += rest_q * (log_rest_q - log_rest_p)
    return loss, tl.where(impossible, 0.0, coef)


@triton.jit
def tailed_reverse_rows(
    log_p,  # [rows, K] fp32
    log_q,  # [rows, K] fp32
    valid,  # [rows, K] bool
    TAIL: tl.constexpr,  # "bucket" or "renormalize"
):
    """Losses [rows, 1] and coefficients of a true reverse KL."""
    # Where there is no entry log q = 0 must not count as mass.
    log_q = tl.where(valid, log_q, -INF)
    signal = log_ratio_or_zero(log_p, log_q)
    if TAIL == "bucket":
        p = exp_precise(log_p)
        rest_p, log_rest_p = rest_of(log_p)
        _, log_rest_q = rest_of(log_q)
        pull = log_rest_p - log_rest_q
        rest = rest_p * pull
    else:
        log_z = log_mass(log_p)
        p = exp_precise(less(log_p, log_z))
        signal -= log_z - log_mass(log_q)
        # Over what has a gradient, so that the coefficients sum to 0 whatever is left out.
        kept = tl.where(signal == INF, 0.0, p)
        pull = row_sum(product_or_zero(kept, signal)) / at_least(row_sum(kept), TINY)
        rest = tl.zeros_like(pull)
    loss = row_sum(product_or_zero(p, signal)) + rest
    without_gradient = (p == 0.0) | (signal == INF)
    return loss, tl.where(without_gradient, 0.0, p * (signal - pull))
