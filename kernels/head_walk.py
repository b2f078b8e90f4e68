"""A walk over the vocabulary on a device, a block of columns at a time and all rows at once: no [N, V].

    forward    x = h W_b^T into a bounded fp32 tile; LSE, logits at the ids (head_tile.py)                       2NVH
    backward   dx from what the forward kept, or from x again;  dh += dx W_b;  dW_b = dx^T h              4NVH, 6NVH

Walking the vocabulary completes a row of dW in one block: dW is rounded to the head's dtype once and written once,
where a walk over rows would read and write an fp32 [V, H] for every chunk of them. What the backward needs of the
forward is e = exp(y - peak), two bytes each beside a 16-bit head, and there is room for it where nothing lies yet: the
rows [B, H] of dW that a block will fill hold the e of H rows. More is kept beside, up to KEPT_BYTES; what is left is
multiplied again. At N = 8,192, H = 4,096, V = 151,936 in bf16 that is 3.3 products in place of 4.

Memory there beyond the gradients, in blocks of at most 8,192 columns (19 of them):

    forward    560 MiB of e, 256 of x in fp32                                                               816 MiB
    backward   560 MiB of e, 128 of dx, 71 of x for the 2,164 rows that were not kept, 128 of dH in fp32    887 MiB
    besides    64 MiB of hidden states without their unused rows (as many again with a mask), 20 of [N, K]; cuBLAS
               keeps 32 MiB of its own

A frozen head has no dW and needs less of everything: head_frozen.py.

Rows that are masked go last, and their number stays on the device: the products and kernels end there.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import PAD
from asyncopd.kernels import head_tile
from asyncopd.kernels.gather import IDS, RIVALS, logprobs_at
from asyncopd.kernels.gemm import product
from asyncopd.kernels.head_gradients import Gradients, unit_of
from asyncopd.kernels.launch import INTERPRET, Scale, cdiv, launch, padded

TILE_ELEMENTS = 1 << 26  # of a block, beside a 16-bit head: 128 MiB of dx, 256 of x; half as many beside an fp32 one
KEPT_BYTES = 560 << 20
MULTIPLE = 128  # columns that blocks begin at multiples of
ALIGNED = 16  # elements: what rows of a block begin at, for wide accesses
TILE_SIZES = (head_tile.MAX_TILE, 2048, 1024)
WARPS = 8


@dataclass(frozen=True, slots=True)
class Block:
    """Columns of the vocabulary, and the (peak, sum) tiles of a row that they are."""

    cols: slice
    first_tile: int
    tiles: int

    @property
    def width(self) -> int:
        return int(self.cols.stop - self.cols.start)

    @property
    def stride(self) -> int:
        """From row to row of a tensor [rows, width]."""
        return cdiv(self.width, ALIGNED) * ALIGNED

    def take(self, memory: Tensor, rows: int) -> Tensor:
        """[rows, width] in flat memory."""
        return memory[: rows * self.stride].view(rows, self.stride)[:, : self.width]


class Blocks:
    """The vocabulary in as few blocks as TILE_ELEMENTS allows, of equal widths but for one MULTIPLE.

    A tile of a row is what one program sums up; with `whole` that is all of a block.
    """

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, *, whole: bool = False) -> None:
        elements = TILE_ELEMENTS * 2 // dtype.itemsize
        widest = max(MULTIPLE, elements // max(1, rows) // MULTIPLE * MULTIPLE)
        number, units = cdiv(vocab, widest), cdiv(vocab, MULTIPLE)
        bounds = [min(vocab, i * units // number * MULTIPLE) for i in range(number + 1)]
        self.widest = max(stop - start for start, stop in pairwise(bounds))
        self.tile = padded(self.widest, 1) if whole else tile_columns(self.widest)
        self.tiles, self.blocks = 0, []
        for start, stop in pairwise(bounds):
            block = Block(slice(start, stop), self.tiles, cdiv(stop - start, self.tile))
            self.blocks.append(block)
            self.tiles += block.tiles

    def memory(self, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """For a tensor [rows, width] of any block."""
        return torch.empty(rows * max(b.stride for b in self.blocks), dtype=dtype, device=device)


def tile_columns(width: int) -> int:
    """Columns of a program in blocks that are `width` wide: the most that leave few of its lanes idle."""
    if width < TILE_SIZES[-1]:
        return padded(width, 128)
    lanes = {tile: cdiv(width, tile) * tile for tile in TILE_SIZES}
    return next((tile for tile in TILE_SIZES if lanes[tile] * 16 <= width * 17), min(lanes, key=lanes.__getitem__))


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
    """Memory for e of the first rows, flat; a block's begins at its first column times the rows that lie there.

    inside: dW's, which holds H elements a column, for `inside_rows` rows; beside: for the rest of `rows`.
    """

    inside: Tensor | None
    beside: Tensor | None
    inside_rows: int
    rows: int

    @property
    def pointers(self) -> tuple[Tensor | None, Tensor | None]:
        """A kernel has both; where rows is 0, none."""
        return (
            self.beside if self.inside is None else self.inside,
            self.inside if self.beside is None else self.beside,
        )


NOTHING = Kept(None, None, 0, 0)


def room_for(rows: int, dweight: Tensor | None, head: Head, blocks: Blocks) -> Kept:
    """Where e will be kept: in dW, then beside it. A softcap's slope needs y, of which e holds too little."""
    if head.softcap is not None:
        return NOTHING
    width = head.weight.shape[1]
    dtype = torch.float32 if head.weight.dtype == torch.float32 else torch.float16
    inside, inside_rows = None, 0
    if dweight is not None:
        inside = dweight.view(dtype).view(-1)
        inside_rows = min(rows, *(width * block.width // block.stride for block in blocks.blocks))
    beside, last = None, blocks.blocks[-1]
    columns = last.cols.start + last.stride
    beside_rows = min(rows - inside_rows, KEPT_BYTES // (columns * dtype.itemsize))
    if beside_rows > 0:
        beside = torch.empty(beside_rows * columns, dtype=dtype, device=head.weight.device)
    return Kept(inside, beside, inside_rows, inside_rows + beside_rows)


class Walk:
    """The rows, those that count first, and the head that they meet."""

    def __init__(self, hidden: Tensor, ids: Tensor, head: Head, count: Tensor | None, *, whole: bool = False) -> None:
        self.hidden, self.ids, self.count = hidden.contiguous(), ids.contiguous(), count
        weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
        self.head = replace(head, weight=weight, bias=None if head.bias is None else head.bias.contiguous())
        rows, self.vocab = hidden.shape[0], head.weight.shape[0]
        self.blocks = Blocks(rows, self.vocab, weight.dtype, whole=whole)
        self.scale = Scale.of(head.temperature)
        self.at_ids = self._empty(*ids.shape)
        tiles = self.blocks.tiles
        self.tile_peaks, self.tile_sums = self._empty(rows, tiles), self._empty(rows, tiles)

    def forward(self, kept: Kept = NOTHING) -> tuple[Tensor, Tensor]:
        """log p [rows, K] and LSE [rows]; rows beyond the count hold anything."""
        rows = self.hidden.shape[0]
        memory = self.blocks.memory(rows, torch.float32, self.hidden.device)
        for block in self.blocks.blocks:
            x = block.take(memory, rows)
            product(self.hidden, self.head.weight[block.cols].t(), x, count=self.count, counted="rows")
            self._launch(
                head_tile.forward_kernel,
                block,
                x,
                self.head.bias,
                self.ids,
                self.count,
                self.at_ids,
                self.tile_peaks,
                self.tile_sums,
                *kept.pointers,
                *self._sizes(block, kept),
                self.ids.shape[1],
                self.head.logit_scale,
                self._softcap,
                self.scale.scale,
                *self._flags,
                kept.rows > 0,
                self.blocks.tile,
                IDS,
            )
        return logprobs_at(
            self.at_ids, self.ids, self.tile_peaks, self.tile_sums, self.vocab, self.scale, gathered=True
        )

    def backward(self, grad: Tensor, logprobs: Tensor, lse: Tensor, gradients: Gradients, kept: Kept = NOTHING) -> None:
        """Gradients of sum(grad * log p), grad [rows, K]; `at_ids` holds y at the ids, by the forward or the caller."""
        rows, weight, device = self.hidden.shape[0], self.head.weight, self.hidden.device
        # kl_rows computes in fp64 where a score of the teacher is fp64; the kernels here take fp32.
        grad = grad.to(torch.float32).masked_fill(self.ids == PAD, 0.0)
        totals = grad.sum(dim=1)
        unit = None
        if weight.dtype == torch.float16:
            unit = unit_of(grad, totals, abs(self.head.logit_scale) / self.head.temperature)
            grad, totals = grad / unit, totals / unit
        values = self._values(grad, logprobs, totals)
        again = rows - kept.rows
        count = None if self.count is None else (self.count - kept.rows).clamp(min=0)
        outputs = self.blocks.memory(rows, weight.dtype, device)
        products = self.blocks.memory(again, torch.float32, device)
        for block in self.blocks.blocks:
            dx, x = block.take(outputs, rows), block.take(products, again)
            if again:
                product(self.hidden[kept.rows :], weight[block.cols].t(), x, count=count, counted="rows")
            self._launch(
                head_tile.backward_kernel,
                block,
                x,
                self.head.bias,
                self.count,
                self.tile_peaks,
                lse,
                totals,
                *kept.pointers,
                dx,
                *self._sizes(block, kept),
                self.head.logit_scale,
                self._softcap,
                self.scale.t,
                *self._flags,
                kept.rows > 0,
                again > 0,
                self.blocks.tile,
                INTERPRET,
            )
            self._scatter(values, dx, block.cols)
            gradients.add(block.cols, dx, weight[block.cols], self.hidden, self.count, unit)
        gradients.finish(unit)

    def _sizes(self, block: Block, kept: Kept) -> tuple[int, ...]:
        """What the tile kernels are told of a block and of the rows that are kept, in their order."""
        return (
            block.stride,
            block.cols.start,
            block.width,
            block.first_tile,
            block.tiles,
            self.blocks.tiles,
            self.head.weight.shape[1],
            kept.inside_rows,
            kept.rows,
        )

    def _values(self, grad: Tensor, logprobs: Tensor, totals: Tensor) -> Tensor:
        """dx at the ids [rows, K], whole."""
        (rows, k), values = self.ids.shape, torch.empty_like(self.at_ids)
        blocks = cdiv(k, IDS)
        if rows * blocks:
            launch(
                head_tile.values_kernel,
                rows * blocks,
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
        blocks = cdiv(k, IDS)
        if rows * blocks:
            launch(
                head_tile.scatter_kernel,
                rows * blocks,
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

    def _launch(self, kernel: Any, block: Block, *arguments: Any) -> None:
        """A program for every tile of every row."""
        if rows := self.hidden.shape[0]:
            launch(kernel, rows * block.tiles, *arguments, num_warps=WARPS)

    @property
    def _softcap(self) -> float:
        return self.head.softcap or 1.0

    @property
    def _flags(self) -> tuple[bool, bool, bool]:
        """HAS_BIAS, HAS_CAP, HAS_COUNT"""
        return self.head.bias is not None, self.head.softcap is not None, self.count is not None

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.hidden.device)
