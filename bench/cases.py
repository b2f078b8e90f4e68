"""Shapes that benchmarks share: real vocabularies, row counts that fit a laptop."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """Logits [rows, vocab] of one dtype."""

    name: str
    rows: int
    vocab: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """What has to be read at least: every logit once."""
        return self.rows * self.vocab * self.dtype.itemsize

    def logits(self) -> Tensor:
        """Peaked like a language model's: a normal spread with a few large ones."""
        rng = torch.Generator().manual_seed(0)
        logits = torch.randn(self.rows, self.vocab, generator=rng) * 2.5
        top = torch.randint(0, self.vocab, (self.rows, 20), generator=rng)
        return logits.scatter_add_(1, top, torch.full((self.rows, 20), 8.0)).to(self.dtype)


CASES = (
    Case("embedded, decoding", 64, 540, torch.float32),
    Case("Qwen3", 128, 151_936, torch.float32),
    Case("Qwen3, bf16", 128, 151_936, torch.bfloat16),
    Case("Llama 3", 128, 128_256, torch.float32),
    Case("Gemma", 64, 262_144, torch.float32),
)
