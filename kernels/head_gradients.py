"""What a walk over the vocabulary adds up and fills in, block by block: the gradients of a head and its inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.backends.reference.head import Head
from asyncopd.kernels.gemm import product

FP16_COLUMNS = 4096  # of dW in fp32 at a time, beside an fp16 head: 64 MiB at H = 4,096


def unit_of(grad: Tensor, totals: Tensor, slope: float) -> Tensor:
    """About the largest dx: a mean's, divided by thousands of rows, would be lost in fp16, which ends at 6e-8."""
    if grad.numel() == 0:
        return grad.new_ones(())
    # Equal ids add up, at most to the sum of a row's magnitudes.
    largest = torch.maximum(grad.abs().sum(dim=1), totals.abs())
    unit = torch.where(torch.isfinite(largest), largest, 0.0).amax() * slope
    return torch.where(unit > 0, unit, 1.0)


@dataclass(slots=True)
class Gradients:
    """dH [rows, H] fp32, dW [V, H] in the head's dtype, db [V] fp32; None where nobody wants it."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, head: Head, need_hidden: bool, need_weight: bool) -> "Gradients":
        def empty(like: Tensor, dtype: torch.dtype) -> Tensor:
            return torch.empty(like.shape, dtype=dtype, device=like.device)

        return cls(
            # The first block makes it: until then its memory is worth more elsewhere.
            empty(hidden[:0], torch.float32) if need_hidden else None,
            empty(head.weight, head.weight.dtype) if need_weight else None,
            None if head.bias is None else empty(head.bias, torch.float32),
        )

    def add(
        self, cols: slice, dx: Tensor, weight: Tensor, hidden: Tensor, count: Tensor | None, unit: Tensor | None
    ) -> None:
        """One block: dx [rows, B] in units of `unit`, the head's rows [B, H] and hidden [rows, H]; `count` rows."""
        if self.hidden is not None:
            if cols.start == 0:
                self.hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
            product(dx, weight, self.hidden, count=count, counted="rows", accumulate=cols.start > 0)
        if self.weight is not None and unit is None:
            product(dx.t(), hidden, self.weight[cols], count=count, counted="depth")
        elif self.weight is not None:
            self._add_weight_in_units(cols, dx, hidden, count, unit)
        if self.bias is not None:
            torch.sum(dx, dim=0, dtype=torch.float32, out=self.bias[cols])

    def _add_weight_in_units(self, cols: slice, dx: Tensor, hidden: Tensor, count: Tensor | None, unit: Tensor) -> None:
        """Through fp32, FP16_COLUMNS at a time: in units of the largest dx a sum may be more than fp16 can hold."""
        assert self.weight is not None
        for start in range(0, dx.shape[1], FP16_COLUMNS):
            some = dx[:, start : start + FP16_COLUMNS].t()
            block = torch.empty(some.shape[0], hidden.shape[1], dtype=torch.float32, device=dx.device)
            product(some, hidden, block, count=count, counted="depth")
            first = cols.start + start
            self.weight[first : first + some.shape[0]].copy_(block.mul_(unit))

    def finish(self, unit: Tensor | None) -> None:
        """After the last block."""
        for gradient in (self.hidden, self.bias):
            if gradient is not None and unit is not None:
                gradient *= unit
