"""From a head's products to its logits and back: logit scale, softcap and temperature, in fp32 without losing a digit.

    z     = c tanh(s y / c) / T,  or  s y / T without a softcap       s: logit scale, c: softcap, T: temperature
    dz/dy = s / T (1 - tanh^2),   tanh = z T / c                      from the stored z alone

Factors come as two floats each, so that none of them adds its own rounding to the result's.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from asyncopd.backends.reference.head import Head
from asyncopd.kernels.epilogue import tanh
from asyncopd.kernels.launch import float_pair
from asyncopd.kernels.numeric import INF


class Factors(NamedTuple):
    """What the kernels take of a head's scalars, in their order; pairs of floats whose sum is meant."""

    inner: float  # s / c, or s / T without a softcap
    inner_low: float
    outer: float  # c / T, the largest |z|
    outer_low: float
    rate: float  # s / T
    rate_low: float
    back: float  # T / c
    back_low: float

    @classmethod
    def of(cls, head: Head) -> "Factors":
        scale, temperature = head.logit_scale, head.temperature
        cap = temperature if head.softcap is None else head.softcap
        numbers = (scale / cap, cap / temperature, scale / temperature, temperature / cap)
        return cls(*(part for number in numbers for part in float_pair(number)))


@triton.jit
def times(x, factor, factor_low):
    """x (factor + factor_low), rounded about once."""
    # inf times a low part that is 0, or of the other sign, would be NaN.
    return tl.where(tl.abs(x) == INF, x * factor, tl.fma(x, factor, x * factor_low))


@triton.jit
def logit_of(y, inner, inner_low, outer, outer_low, HAS_CAP: tl.constexpr):
    """y = h W^T + b -> z."""
    z = times(y, inner, inner_low)
    if HAS_CAP:
        z = times(tanh(z), outer, outer_low)
    return z


@triton.jit
def product_gradient(grad, z, outer, rate, rate_low, back, back_low, HAS_CAP: tl.constexpr):
    """grad of z -> gradient of y."""
    if HAS_CAP:
        share = tl.fma(z, back, z * back_low)
        # A -inf bias saturates the cap: its slope is 0, not what the rounding of c / T makes of it.
        flat = (tl.abs(share) >= 1.0) | (tl.abs(z) >= outer)
        grad = grad * tl.where(flat, 0.0, (1.0 - share) * (1.0 + share))
    return times(grad, rate, rate_low)
