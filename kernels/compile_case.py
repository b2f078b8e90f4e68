"""What has to be compiled ahead of time to know, without a GPU, that a Triton kernel fits one."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class CompileCase:
    """One kernel at the block sizes and dtypes that are used on a device.

    signature: argument name -> Triton type ("*bf16", "i64", "fp32", "constexpr"), in the kernel's order.
    divisible: arguments that are multiples of 16 at these shapes, as the launcher would find out.
    max_registers: per thread; more would cost occupancy that the kernel was designed for.
    archs: where these block sizes are used, of sm_80, 90 and 100.
    """

    name: str
    kernel: Any  # triton.runtime.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    max_registers: int
    num_stages: int = 3
    divisible: tuple[str, ...] = field(default=())
    archs: tuple[int, ...] = (80, 90, 100)
