"""A problem of the sampled head and its answer in fp64, for every backend that has kernels of its own."""

from dataclasses import dataclass, replace
from typing import Self

import pytest
import torch
from torch import Tensor

from asyncopd.backends.reference import linear as reference
from asyncopd.backends.reference.head import Head

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN, CAPPED = (1.0, 1.0, None), (0.7, -1.3, 4.0)  # temperature, logit scale, softcap
Gradients = tuple[Tensor, Tensor, Tensor]  # of hidden, weight, bias


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    grad: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    scalars: tuple[float, float, float | None] = PLAIN

    @classmethod
    def random(
        cls,
        rows: int = 6,
        vocab: int = 23,
        width: int = 40,
        num_ids: int = 9,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Self:
        rng = torch.Generator().manual_seed(rows * 7919 + width)
        return cls(
            hidden=torch.randn(rows, width, generator=rng).to(device, dtype),
            weight=(torch.randn(vocab, width, generator=rng) / width**0.5).to(device, dtype),
            ids=torch.randint(-1, vocab, (rows, num_ids), generator=rng).to(device),
            grad=torch.randn(rows, num_ids, generator=rng).to(device),
            bias=torch.randn(vocab, generator=rng).to(device),
            mask=(torch.arange(rows) % 3 != 1).to(device),
        )

    @classmethod
    def of_counts(cls, counts: list[int], num_ids: int, device: str) -> Self:
        """Id v is named counts[v] times, in rows of num_ids, shuffled."""
        rng = torch.Generator().manual_seed(len(counts))
        ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        ids = ids[torch.randperm(len(ids), generator=rng)].view(-1, num_ids)
        return cls(
            hidden=torch.randn(len(ids), 3, generator=rng).to(device),
            weight=torch.randn(len(counts), 3, generator=rng).to(device),
            ids=ids.to(device),
            grad=torch.randn(ids.shape, generator=rng).to(device),
            bias=torch.randn(len(counts), generator=rng).to(device),
        )

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, *self.scalars)

    @property
    def arguments(self) -> tuple[Tensor, Head, Tensor, Tensor | None]:
        """As the backends' functions take them."""
        return self.hidden, self.head, self.ids, self.mask

    def logits(self, **how: int) -> Tensor:
        raise NotImplementedError

    def gradients(self, need_weight: bool = True, **how: int) -> Gradients:
        raise NotImplementedError

    def add_into(self, weight_grad: Tensor, bias_grad: Tensor | None, **how: int) -> Tensor:
        raise NotImplementedError

    def expected(self) -> tuple[Tensor, Gradients]:
        """Logits and the three gradients in fp64."""
        bias = None if self.bias is None else self.bias.double()
        exact = replace(self, hidden=self.hidden.double(), weight=self.weight.double(), bias=bias)
        logits = reference.linear_gather_logits(*exact.arguments)
        return logits, reference.linear_gather_logits_backward(self.grad.double(), logits, *exact.arguments, True)

    def assert_matches(self, **how: int) -> Gradients:
        logits, gradients = self.logits(**how), self.gradients(**how)
        expected, expected_gradients = self.expected()
        # Sums of about a hundred terms of size 1, each product and sum rounded to fp32.
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=2e-6, equal_nan=True)
        like = (self.hidden, self.weight, self.weight[:0, 0] if self.bias is None else self.bias)
        for got, want, of in zip(gradients, expected_gradients, like, strict=True):
            assert got.dtype == of.dtype
            assert got.shape == of.shape
            assert got.is_contiguous()
            # 16 bits: half a unit in the last place as well, since they are rounded once.
            rtol = 2e-6 if of.dtype == torch.float32 else torch.finfo(of.dtype).eps * 0.51
            torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-5, equal_nan=True)
        return gradients

    def assert_adds(self, into: torch.dtype, rng: torch.Generator, **how: int) -> None:
        """To gradients of dtype `into` whose rows lie apart; the last four are named by nobody."""
        vocab, width = self.weight.shape
        self.ids[self.ids >= vocab - 4] = vocab - 5
        wide = torch.randn(vocab, width + 8, generator=rng).to(self.weight.device, into)
        weight_grad, bias_grad = wide[:, 4:-4], torch.randn(vocab, generator=rng).to(self.weight.device, into)
        weight_grad[-4:], bias_grad[-4:] = torch.nan, torch.nan  # not even read
        before = wide.double(), bias_grad.double()
        dhidden = self.add_into(weight_grad, bias_grad, **how)
        dweight, dbias = self.expected()[1][1:]
        assert torch.equal(dhidden, self.gradients(**how)[0])
        rtol = torch.finfo(into).eps * 0.51 if into != torch.float32 else 2e-6
        close = {"rtol": rtol, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(weight_grad.double(), before[0][:, 4:-4] + dweight, **close)
        torch.testing.assert_close(bias_grad.double(), before[1] + dbias, **close)
        outside = torch.cat([wide[:, :4], wide[:, -4:]], 1).double()
        assert torch.equal(outside, torch.cat([before[0][:, :4], before[0][:, -4:]], 1))

    def assert_refuses_gradients(self) -> None:
        """Buffers that cannot be added to."""
        assert self.bias is not None
        good = torch.zeros_like(self.weight)
        vocab, width = good.shape
        with pytest.raises(ValueError, match=rf"weight_grad: got shape \[{vocab - 1}, .*, expected shape \[{vocab}, "):
            self.add_into(good[1:], None)
        with pytest.raises(ValueError, match=rf"weight_grad: .* strides \[1, {vocab}\]"):
            self.add_into(good.t().contiguous().t(), None)
        with pytest.raises(ValueError, match=r"weight_grad: .* strides \[0, 1\], .* rows that do not overlap"):
            self.add_into(good[:1].expand(vocab, width), None)
        with pytest.raises(ValueError, match=r"weight_grad: got device meta"):
            self.add_into(good.to("meta"), None)
        with pytest.raises(TypeError, match=r"bias_grad: got torch.float64"):
            self.add_into(good, self.bias.double())
