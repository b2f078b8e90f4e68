"""What a device does at most: bytes per second of a large copy, products per second of a large matrix product.

Measured in the run whose results are compared with it, so that both are of one machine in one state.
"""

from dataclasses import dataclass

import torch

from bench.measure import interleave


@dataclass(frozen=True, slots=True)
class Ceilings:
    copy_gb_per_s: float  # bytes read plus bytes written
    gemm_gflop_per_s: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """Large enough for the caches not to matter and the device to be full."""

    copy_bytes: int
    gemm: int  # rows, columns and depth
    dtype: torch.dtype


SIZES = {
    "cuda": Sizes(copy_bytes=2 * 2**30, gemm=8192, dtype=torch.bfloat16),
    "cpu": Sizes(copy_bytes=2**28, gemm=1024, dtype=torch.float32),
}


def measure(device: torch.device, rounds: int = 20) -> Ceilings:
    """The median of many rounds on random numbers: a matrix product of zeros takes less power, and is faster."""
    sizes = SIZES[device.type]
    source = torch.randint(256, (sizes.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(sizes.gemm, sizes.gemm, device=device).to(sizes.dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=out)}
    for call in (*calls.values(), *calls.values()):  # libraries load, clocks rise
        call()
    timings = interleave(calls, device=device, rounds=rounds)
    return Ceilings(
        copy_gb_per_s=2 * sizes.copy_bytes / timings["copy"].median / 1e9,
        gemm_gflop_per_s=2 * sizes.gemm**3 / timings["gemm"].median / 1e9,
    )
