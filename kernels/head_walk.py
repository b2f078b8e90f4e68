"""A walk over the vocabulary on a device, a block of columns at a time and all rows at once: no [N, V].

    forward    x = h W_b^T into a bounded fp32 tile; LSE, logits at the ids (head_tile.py)                       2NVH
    backward   dx from what the forward kept, or from x again;  dh += dx W_b;  dW_b = dx^T h              4NVH, 6NVH

Walking the vocabulary completes a row of dW in one block: dW is rounded to the head's dtype once and written once,
where a walk over rows would read and write an fp32 [V, H] for every chunk of them. What the backward needs of the
forward is e = exp(y - peak), two bytes each beside a 16-bit head, and there is room for it where nothing lies yet: the
rows [B, H] of dW that a block will fill hold the e of H rows. More is kept beside, up to KEPT_BYTES; what is left is
multiplied again. At N = 8,192, H = 4,096, V = 151,936 in bf16 that is 3.3 products in place of 4, and less than 1 GiB
beyond the gradients: 560 MiB kept, 128 each of a tile of x and of dh in fp32, 64 each of dx and of a block of dW.

Rows that are masked go last, and their number stays on the device: the products and kernels end there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import PAD
from asyncopd.kernels import head_tile
from asyncopd.kernels.gather import IDS, RIVALS, logprobs_at
from asyncopd.kernels.gemm import product
from asyncopd.kernels.launch import INTERPRET, Scale, on_device

TILE_ELEMENTS = 1 << 25  # fp32: 128 MiB
KEPT_BYTES = 560 << 20
WARPS = 8


def tile_columns(rows: int, vocab: int) -> int:
    """Columns of one (peak, sum): a power of two, and few enough that a block of one such tile is within bounds."""
    tile = min(head_tile.MAX_TILE, triton.next_power_of_2(triton.cdiv(vocab, 4)))
    while rows * tile > TILE_ELEMENTS:
        tile //= 2
    return max(128, tile)


def column_blocks(rows: int, vocab: int) -> Iterator[slice]:
    """Blocks whose tile of products has about TILE_ELEMENTS, and is at most about a quarter of all logits."""
    tile = tile_columns(rows, vocab)
    width = max(tile, min(TILE_ELEMENTS // max(1, rows), triton.cdiv(vocab, 4)) // tile * tile)
    for start in range(0, vocab, width):
        yield slice(start, min(start + width, vocab))


@dataclass(frozen=True, slots=True)
class Rows:
    """An order in which the rows that count come first; None, None where all do."""

    order: Tensor | None  # [N] int64
    count: Tensor | None  # () int32, on the device

    @classmethod
    def of(cls, mask: Tensor | None) -> "Rows":
        if mask is None:
            return cls(None, None)
        return cls(torch.argsort(mask.to(torch.uint8), descending=True, stable=True), mask.sum(dtype=torch.int32))

    def take(self, tensor: Tensor) -> Tensor:
        """[N, ..] -> the same rows in this order."""
        return tensor if self.order is None else tensor.index_select(0, self.order)

    def take_ids(self, ids: Tensor) -> Tensor:
        """The same of ids [N, K]: rows that do not count have none."""
        taken = self.take(ids).contiguous()
        return taken if self.count is None else torch.where(self._there()[:, None], taken, -1)

    def put(self, tensor: Tensor, fill: float) -> Tensor:
        """Back in their places; `fill` in rows that do not count, whatever the tensor holds for them."""
        if self.order is None:
            return tensor
        there = self._there().view(-1, *(1,) * (tensor.dim() - 1))
        return torch.empty_like(tensor).index_copy_(0, self.order, torch.where(there, tensor, fill))

    def _there(self) -> Tensor:
        assert self.order is not None
        assert self.count is not None
        return torch.arange(self.order.shape[0], device=self.order.device) < self.count


@dataclass(frozen=True, slots=True)
class Kept:
    """Memory for e of the first rows: [V, rows] elements, for each block [rows, B] at the place of its columns."""

    rows: slice
    memory: Tensor | None  # flat; None if nothing is kept
    vocab: int

    @classmethod
    def nothing(cls, rows: slice) -> "Kept":
        return cls(rows, None, 0)

    def __getitem__(self, cols: slice) -> Tensor | None:
        if self.memory is None:
            return None
        rows, width = self.rows.stop - self.rows.start, cols.stop - cols.start
        pitch = self.memory.shape[0] // self.vocab
        start = pitch * cols.start
        return self.memory[start : start + rows * width].view(rows, width)


def room_for(rows: int, dweight: Tensor | None, head: Head) -> list[Kept]:
    """Where e will be kept: in dW, then beside it. A softcap's slope needs y, of which e holds too little."""
    if head.softcap is not None:
        return []
    vocab, width = head.weight.shape
    dtype = torch.float32 if head.weight.dtype == torch.float32 else torch.float16
    kept, begin = [], 0
    if dweight is not None:
        begin = min(rows, width)
        kept.append(Kept(slice(0, begin), dweight.view(dtype).view(-1), vocab))
    beside = min(rows - begin, KEPT_BYTES // (vocab * dtype.itemsize), triton.cdiv(rows, 4))
    if beside > 0:
        memory = torch.empty(beside * vocab, dtype=dtype, device=head.weight.device)
        kept.append(Kept(slice(begin, begin + beside), memory, vocab))
    return kept


@dataclass(frozen=True, slots=True)
class Tiles:
    """For every block of columns a tile [rows, B], all in the same memory."""

    rows: int
    vocab: int
    dtype: torch.dtype
    device: torch.device
    used_rows: int | None = None  # if fewer rows than the blocks are made for

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        rows = self.rows if self.used_rows is None else self.used_rows
        memory = None
        for cols in column_blocks(self.rows, self.vocab):
            width = cols.stop - cols.start
            if memory is None:  # the first block is the widest
                memory = torch.empty(rows * width, dtype=self.dtype, device=self.device)
            yield cols, memory[: rows * width].view(rows, width)


def _unit(grad: Tensor, totals: Tensor, slope: float) -> Tensor:
    """About the largest dx: a mean's, divided by thousands of rows, would be lost in fp16, which ends at 6e-8."""
    if grad.numel() == 0:
        return grad.new_ones(())
    # Equal ids add up, at most to the sum of a row's magnitudes.
    largest = torch.maximum(grad.abs().sum(dim=1), totals.abs())
    unit = torch.where(torch.isfinite(largest), largest, 0.0).amax() * slope
    return torch.where(unit > 0, unit, 1.0)


@dataclass(slots=True)
class Gradients:
    """dH [rows, H] fp32 and 0 at first, dW [V, H] in the head's dtype, db [V] fp32; None where nobody wants it."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, head: Head, need_hidden: bool, need_weight: bool) -> "Gradients":
        return cls(
            torch.zeros_like(hidden, dtype=torch.float32, memory_format=torch.contiguous_format)
            if need_hidden
            else None,
            torch.empty_like(head.weight, memory_format=torch.contiguous_format) if need_weight else None,
            None if head.bias is None else torch.empty(head.bias.shape, dtype=torch.float32, device=hidden.device),
        )

    def add(
        self, cols: slice, dx: Tensor, weight: Tensor, hidden: Tensor, count: Tensor | None, unit: Tensor | None
    ) -> None:
        """One block: dx [rows, B] in units of `unit`, the head's rows [B, H] and hidden [rows, H]; `count` rows."""
        if self.hidden is not None:
            product(dx, weight, self.hidden, count=count, counted="rows", accumulate=True)
        if self.weight is not None and self.weight.dtype == torch.float32:
            product(dx.t(), hidden, self.weight[cols], count=count, counted="depth")
        elif self.weight is not None:
            # Through fp32: cuBLAS may round parts of a 16-bit sum.
            block = torch.empty_like(weight, dtype=torch.float32)
            product(dx.t(), hidden, block, count=count, counted="depth")
            self.weight[cols].copy_(block if unit is None else block.mul_(unit))
        if self.bias is not None:
            torch.sum(dx, dim=0, dtype=torch.float32, out=self.bias[cols])

    def finish(self, unit: Tensor | None) -> None:
        """After the last block."""
        for gradient in (self.hidden, self.bias):
            if gradient is not None and unit is not None:
                gradient *= unit


class Walk:
    """The rows, those that count first, and the head that they meet."""

    def __init__(self, hidden: Tensor, ids: Tensor, head: Head, count: Tensor | None) -> None:
        self.hidden, self.ids, self.count = hidden.contiguous(), ids.contiguous(), count
        weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
        self.head = replace(head, weight=weight, bias=None if head.bias is None else head.bias.contiguous())
        rows, self.vocab = hidden.shape[0], head.weight.shape[0]
        self.tile = tile_columns(rows, self.vocab)
        self.scale = Scale.of(head.temperature)
        self.at_ids = self._empty(*ids.shape)
        tiles = triton.cdiv(self.vocab, self.tile)
        self.tile_peaks, self.tile_sums = self._empty(rows, tiles), self._empty(rows, tiles)

    def forward(self, kept: list[Kept]) -> tuple[Tensor, Tensor]:
        """log p [rows, K] and LSE [rows]; rows beyond the count hold anything."""
        rows = self.hidden.shape[0]
        parts = [*kept, Kept.nothing(slice(kept[-1].rows.stop if kept else 0, rows))]
        tiles = Tiles(rows, self.vocab, torch.float32, self.hidden.device)
        for cols, x in tiles:
            product(self.hidden, self.head.weight[cols].t(), x, count=self.count, counted="rows")
            for part in parts:
                memory = part[cols]
                self._launch(
                    head_tile.forward_kernel,
                    part.rows,
                    cols,
                    x,
                    self.head.bias,
                    self.ids,
                    self.count,
                    self.at_ids,
                    self.tile_peaks,
                    self.tile_sums,
                    memory,
                    x.stride(0),
                    part.rows.start,
                    cols.start,
                    x.shape[1],
                    triton.cdiv(x.shape[1], self.tile),
                    self.tile_peaks.shape[1],
                    self.ids.shape[1],
                    self.head.logit_scale,
                    self._softcap,
                    self.scale.scale,
                    *self._flags,
                    memory is not None,
                    self.tile,
                    IDS,
                )
        return logprobs_at(
            self.at_ids, self.ids, self.tile_peaks, self.tile_sums, self.vocab, self.scale, gathered=True
        )

    def backward(self, grad: Tensor, logprobs: Tensor, lse: Tensor, kept: list[Kept], gradients: Gradients) -> None:
        """Gradients of sum(grad * log p), grad [rows, K]; `at_ids` holds y at the ids, by the forward or the caller."""
        rows, weight = self.hidden.shape[0], self.head.weight
        # kl_rows computes in fp64 where a score of the teacher is fp64; the kernels here take fp32.
        grad = grad.to(torch.float32).masked_fill(self.ids == PAD, 0.0)
        totals = grad.sum(dim=1)
        unit = None
        if weight.dtype == torch.float16:
            unit = _unit(grad, totals, abs(self.head.logit_scale) / self.head.temperature)
            grad, totals = grad / unit, totals / unit
        values = self._values(grad, logprobs, totals)
        rest = slice(kept[-1].rows.stop if kept else 0, rows)
        count = None if self.count is None else (self.count - rest.start).clamp(min=0)
        device = self.hidden.device
        outputs = Tiles(rows, self.vocab, weight.dtype, device)
        products = Tiles(rows, self.vocab, torch.float32, device, rest.stop - rest.start)
        for (cols, dx), (_, x) in zip(outputs, products, strict=True):
            for part in kept:
                memory = part[cols]
                assert memory is not None
                self._softmax_terms(dx, cols, part.rows, memory, lse, totals)
            if rest.start < rest.stop:
                product(self.hidden[rest], weight[cols].t(), x, count=count, counted="rows")
                self._softmax_terms(dx, cols, rest, x, lse, totals, products=True)
            self._scatter(values, dx, cols)
            gradients.add(cols, dx, weight[cols], self.hidden, self.count, unit)
        gradients.finish(unit)

    def _softmax_terms(
        self, dx: Tensor, cols: slice, rows: slice, x: Tensor, lse: Tensor, totals: Tensor, *, products: bool = False
    ) -> None:
        """dx of a block without its ids' part, from products x or from the e that was kept."""
        self._launch(
            head_tile.backward_kernel,
            rows,
            cols,
            x,
            self.head.bias,
            self.count,
            self.tile_peaks,
            lse,
            totals,
            dx,
            x.stride(0),
            dx.stride(0),
            rows.start,
            cols.start,
            dx.shape[1],
            triton.cdiv(dx.shape[1], self.tile),
            self.tile_peaks.shape[1],
            self.head.logit_scale,
            self._softcap,
            self.scale.t,
            *self._flags,
            not products,
            self.tile,
            INTERPRET,
        )

    def _values(self, grad: Tensor, logprobs: Tensor, totals: Tensor) -> Tensor:
        """dx at the ids [rows, K], whole."""
        (rows, k), values = self.ids.shape, torch.empty_like(self.at_ids)
        blocks = triton.cdiv(k, IDS)
        if rows * blocks:
            with on_device(values):
                head_tile.values_kernel[(rows * blocks,)](
                    grad,
                    self.ids,
                    self.at_ids,
                    logprobs,
                    totals,
                    values,
                    k,
                    blocks,
                    self.head.logit_scale,
                    self._softcap,
                    self.scale.t,
                    self.head.softcap is not None,
                    IDS,
                    RIVALS,
                    num_warps=4,
                )
        return values

    def _scatter(self, values: Tensor, dx: Tensor, cols: slice) -> None:
        rows, k = self.ids.shape
        blocks = triton.cdiv(k, IDS)
        if rows * blocks:
            with on_device(values):
                head_tile.scatter_kernel[(rows * blocks,)](
                    values,
                    self.ids,
                    self.count,
                    dx,
                    dx.stride(0),
                    cols.start,
                    dx.shape[1],
                    k,
                    blocks,
                    self.count is not None,
                    IDS,
                    INTERPRET,
                    num_warps=4,
                )

    def _launch(self, kernel: Any, rows: slice, cols: slice, *arguments: Any) -> None:
        """A program for every `tile` columns of every row."""
        programs = (rows.stop - rows.start) * triton.cdiv(cols.stop - cols.start, self.tile)
        if programs:
            with on_device(self.hidden):
                kernel[(programs,)](*arguments, num_warps=WARPS)

    @property
    def _softcap(self) -> float:
        return self.head.softcap or 1.0

    @property
    def _flags(self) -> tuple[bool, bool, bool]:
        """HAS_BIAS, HAS_CAP, HAS_COUNT"""
        return self.head.bias is not None, self.head.softcap is not None, self.count is not None

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.hidden.device)
