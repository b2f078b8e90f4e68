"""Arithmetic that every kernel shares: orders of floats, exponentials, and log-probabilities as sums of two floats.

There is no fp64 on the device. Where one float is not enough, a number is a pair (hi, lo) whose sum it is; where
rounding would have to be the same in whatever order a sum is taken, it is an integer (fixed point in 64 bits).

NaN is written `float("nan")` where it is needed and is no global constant: Triton compares the globals that a kernel
reads with what they were when it was compiled, NaN is not equal to itself, and so every launch would be refused.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)  # what fp32 leaves of it
LN2 = tl.constexpr(0.6931471805599453)
# log(2) in 17 bits, so that its product with an exponent is exact, and the rest.
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.428606820309417e-06)
SQRT2 = tl.constexpr(1.4142135)


@triton.jit
def lowest_key(dtype: tl.constexpr):
    """Below the key of every logit: the key of what is not there."""
    return -(1 << (dtype.primitive_bitwidth - 1))


@triton.jit
def order_key(x):  # bf16, fp16 or fp32 -> int32
    """Integers in the order of the values: NaN above all else, -0 equal to +0. 16-bit dtypes have 16-bit keys.

    Negative floats are ordered by falling bits, so those are flipped. Works on the bits, so the interpreter, whose
    bf16 arithmetic is wrong, gets it right too.
    """
    bits_of_dtype: tl.constexpr = x.dtype.primitive_bitwidth
    magnitude: tl.constexpr = (1 << (bits_of_dtype - 1)) - 1
    infinity: tl.constexpr = 0x7F800000 if x.dtype == tl.float32 else (0x7F80 if x.dtype == tl.bfloat16 else 0x7C00)
    if bits_of_dtype == 32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    key = tl.where(bits < 0, bits ^ magnitude, bits)
    key = tl.where((bits & magnitude) == 0, 0, key)
    return tl.where((bits & magnitude) > infinity, magnitude, key)


@triton.jit
def to_storage(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):  # fp32 -> dtype
    """Rounded to nearest, ties to even; the interpreter cuts bf16 off instead, so there it is rounded here."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def rounded_product(a, b):
    """a * b, rounded before anything is added to it; a product of -0 is +0.

    The compiler may turn `a * b + c` into one fused multiply-add, which adds the product before it is rounded. Where
    the rounding error of a product is added separately, or where equal products must cancel, the result is then wrong.
    A fused sum with 0.0 is not merged with another one, and costs what a product does (-0.0 would be removed).
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def sum_pair(a, b):
    """a + b and its rounding error, exactly."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def product_pair(a, b):
    """a * b and its rounding error, exactly."""
    product = rounded_product(a, b)
    return product, tl.fma(a, b, -product)


@triton.jit
def exp_scaled(x, scale, scale_low):  # fp32 x <= 0, scale + scale_low = log2(e) / temperature
    """exp(x / temperature) to a few 1e-7 of itself for any x; 0 for -inf, NaN for NaN."""
    power, low = product_pair(x, scale)
    low = tl.fma(x, scale_low, low)
    # Where the power is -inf or nearly so, `low` may be NaN.
    return tl.where(power < -150.0, 0.0, rounded_product(tl.exp2(power), tl.fma(low, LN2, 1.0)))


@triton.jit
def exp_precise(x):  # fp32
    """exp(x) to a few 1e-7 of itself for x of either sign; 0, inf and NaN where it is that."""
    power, low = product_pair(x, LOG2E)
    low = tl.fma(x, LOG2E_LOW, low)
    # Out of range `low` may be NaN; what rounds a power that large is of no account.
    return rounded_product(tl.exp2(power), tl.where(tl.abs(power) < 150.0, tl.fma(low, LN2, 1.0), 1.0))


@triton.jit
def to_fixed(mass, SHIFT: tl.constexpr):  # fp32 in [0, 2^(62 - SHIFT)] -> int64
    """mass in units of 2^-SHIFT, cut off: exact for masses of 2^(24 - SHIFT) and more."""
    return (mass * (2.0**SHIFT)).to(tl.int64)


@triton.jit
def log_fixed(total, SHIFT: tl.constexpr):  # int64 > 0
    """log(total / 2^SHIFT) as a pair, to about 1e-7: the exponent's part of it is exact."""
    bits = total.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    above = mantissa > SQRT2
    mantissa = tl.where(above, mantissa * 0.5, mantissa)
    power = (exponent + above.to(tl.int32) - SHIFT).to(tl.float32)
    return power * LN2_HIGH, tl.fma(power, LN2_LOW, tl.log(mantissa))


@triton.jit
def logsumexp_of(peak, log_high, log_low, t, t_low):
    """peak / temperature + log, rounded once. peak +-inf is the result itself; a NaN log gives NaN."""
    product, error = product_pair(peak, t)
    error = tl.fma(peak, t_low, error)
    high, low = sum_pair(product, log_high)
    return tl.where(tl.abs(peak) == INF, peak + log_high, high + (low + (error + log_low)))


@triton.jit
def log_ratio(z, peak, log_high, log_low, t, t_low):
    """z / temperature - (peak / temperature + log), rounded about once; -inf for z = -inf unless the log is NaN."""
    difference, difference_low = sum_pair(z, -peak)
    product, error = product_pair(difference, t)
    error += tl.fma(difference, t_low, difference_low * t)
    high, low = sum_pair(product, -log_high)
    precise = high + (low + (error - log_low))
    # Infinities have no rounding errors: z - (+-inf), +inf - z; and a NaN log makes a NaN.
    rough = (z * t - peak) + log_high
    infinite = tl.maximum(tl.maximum(tl.abs(z), tl.abs(peak)), tl.abs(product)) == INF
    out = tl.where(infinite, rough, precise)
    return tl.where(z == -INF, (log_high - log_high) - INF, out)


@triton.jit
def row_logsumexp(
    tile_peaks,  # [TILES] fp32, this row's: the largest logit of each tile
    tile_sums,  # [TILES] fp32: its exponentials measured from there; NaN if the tile holds a NaN
    tiles,
    scale,
    scale_low,
    TILES: tl.constexpr,  # a power of two, at least `tiles`
    SHIFT: tl.constexpr,
):
    """(peak, log_high, log_low) of a row, for `logsumexp_of` and `log_ratio`. The same whatever ran beside it."""
    tile = tl.arange(0, TILES)
    peaks = tl.load(tile_peaks + tile, mask=tile < tiles, other=-INF)
    sums = tl.load(tile_sums + tile, mask=tile < tiles, other=0.0)
    broken = tl.max((sums != sums).to(tl.int32), axis=0) > 0
    peak = tl.max(peaks, axis=0)
    regular = (tl.abs(peak) < INF) & (broken == 0)
    origin = tl.where(regular, peak, 0.0)
    masses = tl.where(regular, sums * exp_scaled(peaks - origin, scale, scale_low), 1.0)
    log_high, log_low = log_fixed(tl.sum(to_fixed(masses, SHIFT), axis=0), SHIFT)
    log_high = tl.where(regular, log_high, tl.where(broken, float("nan"), 0.0))
    return peak, log_high, tl.where(regular, log_low, 0.0)
