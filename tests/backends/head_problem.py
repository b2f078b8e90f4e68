"""A problem of the exact head, and the comparison of Triton's walks over it with the reference in fp64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from asyncopd import kernels
from asyncopd.backends import reference
from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference.head import Head

INF, NAN = float("inf"), float("nan")
DEVICE = "cpu" if kernels.launch.INTERPRET else "cuda"
# Relative to the largest: what sums of a few dozen terms of these dtypes may lose.
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
Scalars = tuple[float, float, float | None]  # temperature, logit scale, softcap
PLAIN: Scalars = (1.0, 1.0, None)
SCALARS: list[Scalars] = [PLAIN, (0.7, 2.0, None), (1.3, -0.4, 3.0)]
V, K = 300, 5


class Problem:
    """hidden [N, H] with NaN where it is masked, weight [V, H], ids with a double one, pads and a row of pads."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        rows: int = 11,
        width: int = 16,
        *,
        bias: bool = True,
        mask: bool = True,
    ) -> None:
        rng = torch.Generator().manual_seed(rows * 7919 + width)
        self.hidden = torch.randn(rows, width, generator=rng).to(dtype)
        self.weight = torch.randn(V, width, generator=rng).to(dtype)
        self.bias = torch.randn(V, generator=rng).to(dtype) if bias else None
        self.ids = torch.randint(-1, V, (rows, K), generator=rng)
        self.ids[0, 1], self.ids[2] = self.ids[0, 0], -1
        self.mask = torch.rand(rows, generator=rng) < 0.6 if mask else None
        if self.mask is not None:
            self.mask[0] = True
            self.hidden[~self.mask] = NAN
        self.teacher = torch.randn(rows, K, generator=rng).log_softmax(1)
        self.log_weights = torch.randn(rows, K, generator=rng)
        self.grad = torch.randn(rows, K, generator=rng)

    def head(self, scalars: Scalars = PLAIN) -> Head:
        return Head(self.weight, self.bias, *scalars)


def each_tensor(change: Callable[[Tensor], Tensor], argument: Any) -> Any:
    if isinstance(argument, Head):
        bias = None if argument.bias is None else change(argument.bias)
        return replace(argument, weight=change(argument.weight), bias=bias)
    return change(argument) if isinstance(argument, Tensor) else argument


def on_device(*arguments: Any) -> list[Any]:
    return [each_tensor(lambda t: t.to(DEVICE), a) for a in arguments]


def in_fp64(*arguments: Any) -> list[Any]:
    return [each_tensor(lambda t: t.double() if t.is_floating_point() else t, a) for a in arguments]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert actual.shape == expected.shape
    if expected.numel():
        largest = expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
        rounding = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # what is lost below the normal numbers
        torch.testing.assert_close(
            actual.cpu().double(), expected, rtol=0.0, atol=TOLERANCE[dtype] * largest + rounding, equal_nan=True
        )


def compare_losses(problem: Problem, scalars: Scalars, need_weight: bool, denominator: float, **options: Any) -> Tensor:
    """The op against the reference in fp64; returns the gradient of the hidden states that it gave."""
    support = (problem.ids, problem.teacher, problem.log_weights, None)
    arguments = (problem.hidden, problem.head(scalars), problem.mask, *support, torch.tensor(denominator))
    how = (True, need_weight, LossSpec(head_is_certain=False, **options))
    expected = reference.linear_kl(*in_fp64(*arguments), *how)
    actual = kernels.linear_kl(*on_device(*arguments), *how)
    torch.testing.assert_close(actual[0].cpu().double(), expected[0], rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(actual[1].cpu().double(), expected[1], rtol=5e-3, atol=5e-6)  # p99 is a histogram's
    for a, e in zip(actual[2:], expected[2:], strict=True):
        close(a, e, problem.hidden.dtype)
    return actual[2]
