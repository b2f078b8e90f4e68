"""Exponentials of a block of products kept in 12 bits (a candidate), beside a read and a copy of the products."""

import math

import torch
import triton

from bench.measure import Call
from bench.probe.pack12 import pack_kernel, unpack_kernel
from bench.probe.setting import BF16, Setting

TILE, COLUMNS = 4096, 8192
WARPS = (4, 8)


def run(setting: Setting) -> None:
    rows, columns, device = setting.shape.rows, min(setting.shape.vocab, COLUMNS), setting.device
    tiles = triton.cdiv(columns, TILE)
    x, dx = setting.randn(rows, columns), torch.empty(rows, columns, device=device, dtype=BF16)
    high = torch.empty(rows, columns, device=device, dtype=torch.uint8)
    low = torch.empty(rows, columns // 2, device=device, dtype=torch.uint8)
    peaks, sums = torch.empty(rows, tiles, device=device), torch.empty(rows, tiles, device=device)
    log2e = math.log2(math.e)
    calls: dict[str, Call] = {"read x": lambda: x.amax(dim=1), "copy x": lambda: x.clone()}
    for warps in WARPS:
        calls[f"x -> 12 bits, {warps} warps"] = lambda warps=warps: pack_kernel[(rows, tiles)](  # type: ignore[misc]
            x, high, low, peaks, sums, columns, columns, log2e, TILE=TILE, num_warps=warps
        )
        calls[f"12 bits -> dx, {warps} warps"] = lambda warps=warps: unpack_kernel[(rows, tiles)](  # type: ignore[misc]
            high, low, sums, dx, columns, TILE=TILE, INTERPRET=False, num_warps=warps
        )
    setting.compare(calls)
