"""A language-model head as the functions of every backend take it, and plain torch's arithmetic of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.backends.reference.rows import compute_dtype

VOCAB_BLOCK = 8192  # rows of a low-precision head that are upcast at a time


@dataclass(frozen=True, slots=True)
class Head:
    """weight [V, H], bias [V] or None, and the scalars: z = softcap(logit_scale (h W^T + b)) / temperature."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None

    def dtype(self, hidden: Tensor) -> torch.dtype:
        return compute_dtype(hidden, self.weight)

    def _blocks(self, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
        """The weight in `dtype`: itself if it already is, else upcast a block of the vocabulary at a time."""
        vocab = self.weight.shape[0]
        if self.weight.dtype == dtype:
            return [(slice(0, vocab), self.weight)]
        starts = range(0, vocab, VOCAB_BLOCK)
        return [(slice(s, min(s + VOCAB_BLOCK, vocab)), self.weight[s : s + VOCAB_BLOCK]) for s in starts]

    def _multiplies_16_bits(self, hidden: Tensor) -> bool:
        """Whether the product can be had without an upcast: a GPU's tensor cores sum products of 16-bit values in fp32.

        Such products are exact in fp32, so this is the same arithmetic, 10 to 20 times as fast. Not so the gradient's
        products: their dz is fp32, and rounding it to 16 bits would be another specification.
        """
        if hidden.device.type != "cuda" or hidden.dtype != self.weight.dtype:
            return False
        if hidden.dtype == torch.float16:  # torch can be told to sum these in fp16
            return not torch.backends.cuda.matmul.allow_fp16_accumulation
        return hidden.dtype == torch.bfloat16

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [C, H] -> z [C, V], in `out` if given: products of the given bf16/fp16 values, summed in fp32."""
        dtype = self.dtype(hidden)
        z = out
        if z is None:
            z = torch.empty(hidden.shape[0], self.weight.shape[0], dtype=dtype, device=hidden.device)
        if self._multiplies_16_bits(hidden):
            torch.mm(hidden, self.weight.t(), out_dtype=dtype, out=z)
        else:
            hidden = hidden.to(dtype)
            for cols, block in self._blocks(dtype):
                torch.mm(hidden, block.to(dtype).t(), out=z[:, cols])
        if self.bias is not None:
            z += self.bias.to(dtype)
        return self.epilogue(z)

    def epilogue(self, z: Tensor) -> Tensor:
        """Scale, softcap and temperature, in place on h W^T + b."""
        if self.logit_scale != 1.0:
            z *= self.logit_scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.div_(self.temperature) if self.temperature != 1.0 else z

    def epilogue_gradient(self, dz: Tensor, z: Tensor | None) -> Tensor:
        """dz -> gradient of h W^T + b, in place on dz; z is needed with a softcap only (tanh' = 1 - tanh^2)."""
        if self.softcap is not None:
            assert z is not None
            tanh = z * (self.temperature / self.softcap)
            # z = -inf comes from a -inf bias and saturates the cap: its slope is 0.
            dz *= 1.0 - tanh * tanh
        return dz.mul_(self.logit_scale / self.temperature)

    def times_weight(self, dy: Tensor) -> Tensor:
        """dy [C, V] -> dy W [C, H] in dy's dtype."""
        out = torch.zeros(dy.shape[0], self.weight.shape[1], dtype=dy.dtype, device=dy.device)
        for cols, block in self._blocks(dy.dtype):
            out.addmm_(dy[:, cols], block.to(dy.dtype))
        return out
