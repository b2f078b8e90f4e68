"""A gradient times its upstream factor, in place, by fewer programs than it has blocks."""

import pytest
import torch
from each_backend import DEVICES

from asyncopd.kernels import scale, scale_gradient_

DEVICE = DEVICES["triton"]


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_element_is_scaled_once(dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "PROGRAMS", 2)
    for size in (0, 1, scale.BLOCK, 5 * scale.BLOCK + 7):
        values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(DEVICE, dtype)
        expected = (values.float() * factor).to(dtype)
        scale_gradient_(values, torch.tensor(factor, device=DEVICE))
        assert torch.equal(values, expected)


def test_what_was_dropped_is_zero_even_where_it_is_nan() -> None:
    values = torch.full((scale.BLOCK + 1,), float("nan"), device=DEVICE)
    scale_gradient_(values, torch.tensor(0.0, device=DEVICE))
    assert not values.any()
