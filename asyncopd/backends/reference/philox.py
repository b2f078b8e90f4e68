"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The draw of a row is a pure function of (key, row counter, draw number), so it depends on neither batch, chunk nor
thread count. Every backend implements this file:

    key     = the low and high 32 bits of the int64 stream
    counter = (block, 0, low and high 32 bits of the row number within the stream)
    uniform 2b + j of a row = (52 bits of words 2j, 2j + 1 of block b, + 1/2) / 2^52, strictly between 0 and 1
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * x for x in [0, 2^32) held in int64. The product wraps; its bits are still right."""
    product = x * a
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds over broadcastable int64 tensors that hold 32-bit words; returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(streams: Tensor, row_numbers: Tensor, count: int) -> Tensor:
    """fp64 [N, count] in (0, 1) for int64 streams [N] and row numbers [N] (0 where each row has its own stream)."""
    blocks = torch.arange(-(-count // 2), device=streams.device)
    zero = torch.zeros_like(blocks)
    row_low, row_high = (row_numbers & _MASK)[:, None], ((row_numbers >> 32) & _MASK)[:, None]
    key = ((streams & _MASK)[:, None], ((streams >> 32) & _MASK)[:, None])
    words = torch.stack(philox4x32((blocks, zero, row_low, row_high), key), dim=-1)  # [N, blocks, 4]
    high, low = words[..., 0::2], words[..., 1::2]  # [N, blocks, 2]
    bits = (high >> 6 << 26) | (low >> 6)  # 52 bits, so that adding 1/2 is exact in fp64
    return ((bits.double() + 0.5) * 2.0**-52).flatten(1)[:, :count]
