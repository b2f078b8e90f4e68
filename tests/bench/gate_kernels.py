"""Triton kernels for the tests of the compile gate: one that is clean, and one for each fault."""

import triton
import triton.language as tl

from asyncopd.kernels.compile_case import CompileCase


@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2.0, mask=at < n)


@triton.jit
def scale_in_fp64(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n).to(tl.float64) * 1.1
    tl.store(y + at, value.to(tl.float32), mask=at < n)


NAN = tl.constexpr(float("nan"))


@triton.jit
def reads_nan(y, BLOCK: tl.constexpr):
    """Compiles, and Triton refuses every launch: NAN is not what it was."""
    tl.store(y + tl.arange(0, BLOCK), NAN)


@triton.jit
def softmax(x, y, n, BLOCK: tl.constexpr):
    """Holds its whole row: with a small block in registers, with a large one in local memory."""
    at = tl.arange(0, BLOCK)
    z = tl.load(x + at, mask=at < n, other=-float("inf"))
    e = tl.exp(z - tl.max(z, 0))
    tl.store(y + at, e / tl.sum(e, 0), mask=at < n)


def _case(name, kernel, block, max_registers=64, num_warps=4):
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": block},
        num_warps=num_warps,
        max_registers=max_registers,
        divisible=("x", "y", "n"),
    )


def compile_cases():
    return [
        _case("clean", scale, 1024),
        _case("fp64", scale_in_fp64, 1024),
        _case("greedy", softmax, 1024, max_registers=12),
        _case("spilling", softmax, 8192, max_registers=255, num_warps=1),
    ]
