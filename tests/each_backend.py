"""What a test that runs on every backend is given: see the fixtures of conftest.py."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd import backends

# Triton's interpreter takes CPU tensors.
DEVICES = {"triton": "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda", "cuda": "cuda"}
# fp64: rounding of a few hundred terms. fp32: the same, 2^29 times larger, seen through one exp and one log.
TOLERANCES = {torch.float64: (1e-10, 1e-12), torch.float32: (3e-5, 3e-6)}


def label(value: object) -> str:
    """A parameter in a test's name, the same in every process: a function's address is not."""
    return getattr(value, "__name__", str(value))


def rounding_of_dz(engine: str, dz: Tensor) -> Tensor:
    """How far dz [N, V] of a 16-bit head may be from what dh = dz W, dW = dz^T h and db = sum(dz) are made of.

    On a GPU the operands of these products have 16 bits: dz is rounded to bf16 (2^-8 of itself), and its softmax is
    kept in fp16 (2^-11). A model in fp64 with the one rounding to bf16 gives the errors of an H100 to the last digit.
    """
    return (2**-8 + 2**-11 if engine == "triton" else 0.0) * dz.abs()


def runs(name: str) -> bool:
    """Whether a backend can run on this machine at all."""
    try:
        return backends.unavailable_reason(name) is None
    except ImportError:
        return False


@dataclass(frozen=True)
class Backend:
    """An engine, and the dtype that a test's log-probabilities have on it."""

    name: str
    dtype: torch.dtype

    def tensor(self, values: Tensor) -> Tensor:
        """Float values in this backend's dtype, ids as they are."""
        return values.to(self.dtype) if values.is_floating_point() else values

    def close(self, actual: Tensor, expected: Tensor) -> None:
        """Fail unless `actual` has this backend's dtype and is within its rounding of `expected` (fp64)."""
        assert actual.dtype == self.dtype
        rtol, atol = TOLERANCES[self.dtype]
        torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)
