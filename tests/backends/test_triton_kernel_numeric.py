"""The arithmetic under the Triton kernels: orders, fixed point, pairs of floats, addresses, random numbers."""

import math
import random
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from each_backend import DEVICES
from torch import Tensor

from asyncopd.backends.reference.philox import uniforms
from asyncopd.kernels.launch import Scale
from asyncopd.kernels.numeric import exp_scaled, log_fixed, log_ratio, logsumexp_of, order_key, to_fixed, to_storage
from asyncopd.kernels.sample import ratio, scaled, uniform_bits
from asyncopd.kernels.summary import row_start

DEVICE = DEVICES["triton"]
INF = float("inf")


@triton.jit
def _keys(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, order_key(tl.load(x + at)))


def keys_of(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.int32, device=DEVICE)
    _keys[(1,)](x.to(DEVICE), out, x.numel())
    return out.cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_float_has_its_place(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    keys, values = keys_of(x), x.double()
    assert int(keys.min()) > -(2**15)  # the lowest key is for what is not there
    nan = values.isnan()
    assert (keys[nan] == 2**15 - 1).all()
    order = values[~nan].sort()
    steps = keys[~nan][order.indices].diff()
    assert torch.equal(steps > 0, order.values.diff() > 0)
    assert torch.equal(steps == 0, order.values.diff() == 0)  # only -0 and +0
    assert keys[values == INF].item() < 2**15 - 1


def test_fp32_keys_are_in_the_order_of_the_values() -> None:
    tiny = 2.0**-149
    x = [-INF, -3.4e38, -1.0, -tiny, -0.0, 0.0, tiny, 2.0**-126, 1.0, 1.0 + 2.0**-23, 3.4e38, INF]
    keys = keys_of(torch.tensor([*x, float("nan"), -float("nan"), 5.0, 6.0])).tolist()
    assert all(a < b for a, b in pairwise(keys[:5]))
    assert keys[4] == keys[5] == 0
    assert all(a < b for a, b in pairwise(keys[5:13]))
    assert keys[12] == keys[13] == 2**31 - 1
    assert min(keys) > -(2**31)


@triton.jit
def _integers(a, b, scaled_out, ratio_out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(scaled_out + at, scaled(tl.load(a + at), tl.load(b + at)))
    part, whole = tl.load(a + at) >> 13, (tl.load(b + at) >> 12) + 1
    small, large = tl.minimum(part, whole), tl.maximum(part, whole)
    tl.store(ratio_out + at, ratio(small, large + 1))


def test_products_and_ratios_of_integers_are_exact() -> None:
    numbers = random.Random(0)
    a = [0, 1, 2**63 - 1, 2**63 - 1024, *(numbers.randrange(2 ** numbers.randrange(1, 64)) for _ in range(60))]
    b = [1, 2**62 - 1, 2**62 - 1, 7, *(numbers.randrange(1, 2 ** numbers.randrange(2, 63)) for _ in range(60))]
    out = torch.empty(2, 64, dtype=torch.int64, device=DEVICE)
    _integers[(1,)](torch.tensor(a, device=DEVICE), torch.tensor(b, device=DEVICE), out[0], out[1], 64)
    assert out[0].tolist() == [x * y >> 63 for x, y in zip(a, b, strict=True)]
    pairs = [sorted((x >> 13, (y >> 12) + 1)) for x, y in zip(a, b, strict=True)]
    assert out[1].tolist() == [((small << 48) // (large + 1)) << 15 for small, large in pairs]


@triton.jit
def _uniforms(stream, row, out, BLOCK: tl.constexpr):
    draw = tl.arange(0, BLOCK)
    tl.store(out + draw, uniform_bits(tl.load(stream), tl.load(row), draw))


@pytest.mark.parametrize("stream", [0, 1, -1, 2**63 - 1, -(2**63), 2**32 + 5])
@pytest.mark.parametrize("row", [0, 3, 2**33 + 1])
def test_uniform_numbers_are_the_references(stream: int, row: int) -> None:
    numbers = torch.tensor([stream]), torch.tensor([row])
    out = torch.empty(64, dtype=torch.int64, device=DEVICE)
    _uniforms[(1,)](*(x.to(DEVICE) for x in numbers), out, 64)
    expected = [int(u * 2**53) << 10 for u in uniforms(*numbers, 64)[0].tolist()]
    assert out.tolist() == expected


@triton.jit
def _address(base, row, stride, out):
    tl.store(out, row_start(base, tl.load(row), stride).to(tl.int64) - base.to(tl.int64))


@pytest.mark.parametrize(("row", "stride"), [(14_200, 151_936), (65_535, 262_144), (2**31 - 1, 2**31 - 1), (3, 2**40)])
def test_row_offsets_go_beyond_32_bits(row: int, stride: int) -> None:
    assert row * stride > 2**31
    x, out = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE), torch.empty(1, dtype=torch.int64, device=DEVICE)
    _address[(1,)](x, torch.tensor([row], dtype=torch.int32, device=DEVICE), stride, out)
    assert out.item() == row * stride * 2


@triton.jit
def _scaled_exp(x, out, scale, scale_low, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, exp_scaled(tl.load(x + at), scale, scale_low))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_exponentials_are_right_however_small(temperature: float) -> None:
    x = torch.cat([-torch.linspace(0, 60, 254), torch.tensor([-INF, -1e30])])
    out = torch.empty(256, device=DEVICE)
    _scaled_exp[(1,)](x.to(DEVICE), out, *Scale.of(temperature)[2:], 256)
    expected = (x.double() / temperature).exp()
    torch.testing.assert_close(out.double().cpu(), expected, rtol=5e-7, atol=0)


@triton.jit
def _logs(x, z, out, t, t_low, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    high, low = log_fixed(to_fixed(tl.load(x + at), SHIFT), SHIFT)
    tl.store(out + at, high + low)
    logit = tl.load(z + at)
    tl.store(out + BLOCK + at, log_ratio(logit, 40.5, high, low, t, t_low))
    tl.store(out + 2 * BLOCK + at, logsumexp_of(logit, high, low, t, t_low))


@pytest.mark.parametrize("shift", [44, 30])
def test_logs_and_log_probabilities_lose_no_more_than_their_last_digit(shift: int) -> None:
    x = 2.0 ** torch.linspace(0, 17, 256)
    z = torch.linspace(-50, 40, 256)
    t, t_low, *_ = Scale.of(0.7)
    out = torch.empty(3, 256, device=DEVICE)
    _logs[(1,)](x.to(DEVICE), z.to(DEVICE), out, t, t_low, shift, 256)
    log, zd = x.double().log(), z.double() / 0.7
    expected = torch.stack([log, zd - (40.5 / 0.7 + log), zd + log])
    # Half a unit of the result, and 1.5e-7 for the log of a sum that fp32 holds.
    torch.testing.assert_close(out.double().cpu(), expected, rtol=2**-24 * 1.01, atol=1.5e-7)


@triton.jit
def _stored(x, out, INTERPRET: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, to_storage(tl.load(x + at), out.dtype.element_ty, INTERPRET))


def test_bf16_is_rounded_to_nearest_even() -> None:
    x = torch.cat(
        [torch.randn(120), torch.tensor([1.00390625, 1.01171875, -1.00390625, INF, -INF, 3.4e38, 0.0, math.nan])]
    )
    out = torch.empty(128, dtype=torch.bfloat16, device=DEVICE)
    _stored[(1,)](x.to(DEVICE), out, DEVICE == "cpu", 128)
    torch.testing.assert_close(out.cpu(), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_scale_is_fp64_in_two_floats_and_never_infinite() -> None:
    for temperature in (0.3, 1.0, 7.0):
        t, t_low, scale, scale_low = Scale.of(temperature)
        assert t + t_low == pytest.approx(1 / temperature, rel=2**-46)
        assert scale + scale_low == pytest.approx(math.log2(math.e) / temperature, rel=2**-46)
    assert all(math.isfinite(x) for x in Scale.of(1e-42))
