"""From products to the logits of a head: z = cap tanh(s (h w + b) / cap), or s (h w + b) without a cap; all in fp32.

As a device function it costs a GEMM's epilogue a few instructions an element. As a kernel of its own, in place on
logits that cuBLAS has made, it is one read and one write of them (8 bytes a logit); a head without bias, scale and cap
has none.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import cdiv, launch
from asyncopd.kernels.numeric import LOG2E, rounded_product
from asyncopd.kernels.summary import row_start

TILE = 2048  # a program's columns

# tanh(x) / x - 1 = x^2 P(x^2) to 1e-9 for |x| <= 0.55 (least squares, reweighted towards the smallest largest error).
P0 = tl.constexpr(-0.33333316445350647)
P1 = tl.constexpr(0.13332585990428925)
P2 = tl.constexpr(-0.05385230854153633)
P3 = tl.constexpr(0.021071679890155792)
P4 = tl.constexpr(-0.0062742396257817745)


@triton.jit
def tanh(x):  # fp32
    """To about two units in the last place, 0.6 of one below 0.55; +-1 at +-inf, NaN for NaN."""
    magnitude = tl.abs(x)
    t = x * x
    series = tl.fma(tl.fma(tl.fma(tl.fma(P4, t, P3), t, P2), t, P1), t, P0)
    near = tl.fma(x, t * series, x)
    far = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    return tl.where(magnitude < 0.55, near, tl.where(x < 0.0, -far, far))


@triton.jit
def head_logit(x, bias, logit_scale, softcap, softcap_inverse, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """x, bias: fp32. Every step is rounded by itself, so the same product is the same logit in every kernel."""
    if HAS_BIAS:
        x = x + bias
    x = rounded_product(x, logit_scale)
    if HAS_CAP:
        ratio = x * softcap_inverse
        # As a division rounds; not where the ratio is infinite.
        exact = tl.fma(tl.fma(-ratio, softcap, x), softcap_inverse, ratio)
        x = rounded_product(softcap, tanh(tl.where(tl.abs(ratio) < 16.0, exact, ratio)))
    return x


@triton.jit
def _epilogue_kernel(
    z,  # [N, V] fp32, unit column stride: products, and then logits
    bias,  # [V] fp32, or None
    row_stride,
    vocab,
    tiles,
    logit_scale,
    softcap,
    softcap_inverse,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TILE: tl.constexpr,
):
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    column = tile * TILE + tl.arange(0, TILE)
    there = column < vocab
    at = row_start(z, row, row_stride) + column
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + column, mask=there, other=0.0)
    x = tl.load(at, mask=there, other=0.0)
    tl.store(at, head_logit(x, b, logit_scale, softcap, softcap_inverse, HAS_BIAS, HAS_CAP), mask=there)


class Epilogue(NamedTuple):
    """In the order that kernels take it. bias [V] fp32."""

    bias: Tensor | None
    logit_scale: float
    softcap: float
    softcap_inverse: float
    has_bias: bool
    has_cap: bool

    @classmethod
    def of(cls, bias: Tensor | None, logit_scale: float, softcap: float | None) -> "Epilogue":
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        cap = 1.0 if softcap is None else softcap
        return cls(bias, logit_scale, cap, 1.0 / cap, bias is not None, softcap is not None)

    @property
    def trivial(self) -> bool:
        return not self.has_bias and not self.has_cap and self.logit_scale == 1.0

    def apply(self, z: Tensor) -> None:
        """In place on products [N, V], fp32 with unit column stride."""
        rows, vocab = z.shape
        if self.trivial or rows == 0:
            return
        tiles = cdiv(vocab, TILE)
        launch(
            _epilogue_kernel,
            rows * tiles,
            z,
            self.bias,
            z.stride(0),
            vocab,
            tiles,
            self.logit_scale,
            self.softcap,
            self.softcap_inverse,
            self.has_bias,
            self.has_cap,
            TILE,
            num_warps=4,
        )


def compile_cases() -> list[CompileCase]:
    return [
        CompileCase(
            name="epilogue-bias-softcap",
            kernel=_epilogue_kernel,
            signature={
                **dict.fromkeys(("z", "bias"), "*fp32"),
                **dict.fromkeys(("row_stride", "vocab", "tiles"), "i32"),
                **dict.fromkeys(("logit_scale", "softcap", "softcap_inverse"), "fp32"),
                **dict.fromkeys(("HAS_BIAS", "HAS_CAP", "TILE"), "constexpr"),
            },
            constexprs={"HAS_BIAS": True, "HAS_CAP": True, "TILE": TILE},
            num_warps=4,
            max_registers=64,
            divisible=("z", "bias", "row_stride", "vocab"),
        )
    ]
