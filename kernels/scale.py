"""A gradient that was made in the forward times what the backward brings: usually 1, which only the device knows.

Limit: nothing where the factor is 1 (a program reads four bytes and ends, and there are no more of them than an H100
holds at a time: for a head's 622 million elements one a block would be 151,936); else one read and one write in place,
with no second [V, H] beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import INTERPRET, cdiv, launch
from asyncopd.kernels.numeric import to_storage

BLOCK = 4096  # elements of a program at a time
PROGRAMS = 1056  # 8 of 8 warps on each of 132 SMs


@triton.jit
def _scale_kernel(
    values,  # [size], contiguous
    factor,  # ()
    size,
    blocks,  # of BLOCK values; size + BLOCK may not fit into 32 bits
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            at = tl.full((), BLOCK, tl.int64) * block + tl.arange(0, BLOCK)
            value = tl.load(values + at, mask=at < size, other=0.0).to(tl.float32)
            # What the caller dropped has gradient 0, even where it is NaN.
            value = tl.where(by == 0.0, 0.0, value * by)
            tl.store(values + at, to_storage(value, values.dtype.element_ty, INTERPRET), mask=at < size)


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (), in place and in fp32; 0 where the factor is 0. The gradient is contiguous."""
    if not gradient.is_contiguous():
        raise ValueError(f"gradient: got strides {list(gradient.stride())}, expected a contiguous tensor")
    size = gradient.numel()
    if size:
        # A teacher in fp64 makes the loss fp64, and so what its backward is given.
        factor = factor.to(torch.float32)
        blocks = cdiv(size, BLOCK)
        programs = min(PROGRAMS, blocks)
        launch(_scale_kernel, programs, gradient, factor, size, blocks, BLOCK, INTERPRET, num_warps=8)


def compile_cases() -> list[CompileCase]:
    return [
        CompileCase(
            name=f"scale-{dtype}",
            kernel=_scale_kernel,
            signature={
                "values": f"*{dtype}",
                "factor": "*fp32",
                "size": "i64",
                "blocks": "i32",
                "BLOCK": "constexpr",
                "INTERPRET": "constexpr",
            },
            constexprs={"BLOCK": BLOCK, "INTERPRET": False},
            num_warps=8,
            max_registers=40,
            divisible=("values", "factor", "size"),
        )
        for dtype in ("bf16", "fp16", "fp32")
    ]
