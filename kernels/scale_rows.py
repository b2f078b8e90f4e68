"""Coefficients of a row loss times what the backward brings for each row.

Limit: one read and one write of [N, K] in place; a row whose factor is 1 is not touched.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import Prepared, cdiv, padded, warps_for

ENTRIES = 1024  # of a program, where a row is not longer


@triton.jit(do_not_specialize=["num_rows"])
def _scale_rows_kernel(
    coef,  # [N, K] fp32, contiguous
    factors,  # [N] fp32, contiguous
    num_rows,
    num_ids,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    by = tl.load(factors + row, mask=row < num_rows, other=1.0)[:, None]
    at = row.to(tl.int64)[:, None] * num_ids + column[None, :]
    inside = (by != 1.0) & (column < num_ids)[None, :]
    value = tl.load(coef + at, mask=inside, other=0.0)
    # What the caller dropped has gradient 0, even where it is NaN.
    tl.store(coef + at, tl.where(by == 0.0, 0.0, value * by), mask=inside)


def scale_rows_(coef: Tensor, factors: Tensor) -> None:
    """coef [N, K] fp32, contiguous, times factors [N], in place; 0 where the factor is 0, even if coef is NaN there."""
    rows, num_ids = coef.shape
    if rows * num_ids:
        block, scale = _prepared(num_ids)
        scale(cdiv(rows, block), coef, factors.to(torch.float32).contiguous(), rows)


@lru_cache(maxsize=256)
def _prepared(num_ids: int) -> tuple[int, Prepared]:
    width = padded(num_ids, 1)
    rows = max(1, ENTRIES // width)
    return rows, Prepared(_scale_rows_kernel, num_ids, rows, width, num_warps=warps_for(rows * width, 4))


def compile_cases() -> list[CompileCase]:
    return [
        CompileCase(
            name="scale-rows",
            kernel=_scale_rows_kernel,
            signature={
                "coef": "*fp32",
                "factors": "*fp32",
                "num_rows": "i32",
                "num_ids": "i32",
                "ROWS": "constexpr",
                "WIDTH": "constexpr",
            },
            constexprs={"ROWS": ENTRIES // 64, "WIDTH": 64},
            num_warps=warps_for(ENTRIES, 4),
            max_registers=40,
            divisible=("coef", "factors", "num_ids"),
        )
    ]
