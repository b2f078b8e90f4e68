"""Toy kernels for the tests of launches: one with every kind of argument, and one for each fault."""

import triton
import triton.language as tl

GLOBAL = tl.constexpr(2.0)
NOT_A_NUMBER = tl.constexpr(float("nan"))


@triton.jit(do_not_specialize=["plain"])
def every_argument(x, y, optional, size, stride, plain, factor, BLOCK: tl.constexpr, WORD: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at * stride, mask=at < size).to(tl.float32) * factor + plain
    if WORD == "add" and optional is not None:
        value += tl.load(optional + at, mask=at < size).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < size)


@triton.jit
def scale_kernel(x, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < size) * GLOBAL, mask=at < size)


@triton.jit
def nan_kernel(x, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.where(at < size, NOT_A_NUMBER, 0.0), mask=at < size)


@triton.jit
def add_kernel(x, added, size, BLOCK: tl.constexpr):
    """`added`: a pointer to one number."""
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < size) + tl.load(added).to(tl.float32), mask=at < size)


@triton.jit
def wide_kernel(x, size, BLOCK: tl.constexpr):
    """Takes fp32 and computes in fp64."""
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size).to(tl.float64) * 1.1
    tl.store(x + at, value.to(tl.float32), mask=at < size)


@triton.jit
def spilling_kernel(x, size, BLOCK: tl.constexpr):
    """A block that one warp does not hold in its registers."""
    at = tl.arange(0, BLOCK)
    z = tl.load(x + at, mask=at < size, other=0.0)
    e = tl.exp(z - tl.max(z, 0))
    tl.store(x + at, e / tl.sum(e, 0), mask=at < size)
