"""A walk over the vocabulary, a block of columns at a time and all rows at once: the exact head without an [N, V].

A block is one GEMM into a tile [N, B] of logits that is still in cache when the kernels of csrc/cpu read it. Walking
the vocabulary rather than the rows reads every row of the head once a pass, and completes a row of its gradient in
one block: no partial sums of [V, H] are read and written again.

    forward    z = h W_b^T;  running LSE, logits at the ids                                              2NVH
    backward   z as stored, or again;  dz = scatter(g) - (sum g) softmax(z);  dh += dz W_b;  dW_b = dz^T h
                                                                                               4NVH, or 6NVH
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asyncopd.backends.cpu.memory import empty_gradient
from asyncopd.backends.native import _C, raise_for_status
from asyncopd.backends.reference.head import Head

# Elements of a tile (fp32: 4 MiB, which a last-level cache holds beside a block of the head), and bounds on its
# columns: fewer make thin GEMMs, more upcast a large part of a 16-bit head at once.
TILE_ELEMENTS = 1 << 20
MIN_COLUMNS, MAX_COLUMNS = 512, 8192


def column_blocks(num_rows: int, vocab: int, tile_elements: int | None = None) -> Iterator[slice]:
    """The head's columns in blocks whose tile of `num_rows` rows has about TILE_ELEMENTS, or as many as given.

    All but the last are of one width, a multiple of 64, and the last is not much narrower.
    """
    most = min(MAX_COLUMNS, max(MIN_COLUMNS, (tile_elements or TILE_ELEMENTS) // max(1, num_rows) // 64 * 64))
    blocks = -(-vocab // most)
    width = -(-vocab // (64 * max(1, blocks))) * 64
    for start in range(0, vocab, width):
        yield slice(start, min(start + width, vocab))


def fits_one_tile(num_rows: int, vocab: int) -> bool:
    """Whether all logits are no larger than a tile is anyway, so that there is nothing to gain from a walk."""
    return vocab <= MAX_COLUMNS and num_rows * vocab <= TILE_ELEMENTS


@dataclass(frozen=True, slots=True)
class Tiles:
    """Where the tile [rows, width] of each block lies: fp32 memory, `pitch` elements of it for every column before.

    lent: the memory is that of dW, so that a block's gradient cannot be computed where its logits are.
    """

    memory: Tensor
    rows: int
    pitch: int
    lent: bool = False

    @classmethod
    def one(cls, rows: int, vocab: int, tile_elements: int | None = None) -> "Tiles":
        """One tile, for every block in turn."""
        width = max((cols.stop - cols.start for cols in column_blocks(rows, vocab, tile_elements)), default=0)
        return cls(torch.empty(rows * width, dtype=torch.float32), rows, 0)

    @classmethod
    def all(cls, rows: int, vocab: int) -> "Tiles":
        """A tile for each block: as much as [rows, V]."""
        return cls(torch.empty(rows * vocab, dtype=torch.float32), rows, rows)

    @classmethod
    def inside(cls, dweight: Tensor, rows: int) -> "Tiles | None":
        """A tile for each block, in the memory of that block of the head's gradient; None if it is too narrow."""
        width = dweight.shape[1] * dweight.itemsize // 4
        if rows > width or dweight.shape[1] * dweight.itemsize % 4:
            return None
        return cls(dweight.view(torch.float32).view(-1), rows, width, lent=True)

    def __getitem__(self, cols: slice) -> Tensor:
        width = cols.stop - cols.start
        start = self.pitch * cols.start
        return self.memory[start : start + self.rows * width].view(self.rows, width)


@dataclass(slots=True)
class Gradients:
    """dH [rows, H] and db [V] in fp32, dW [V, H] in the head's dtype. None where nobody wants it."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def empty(cls, hidden: Tensor, head: Head, *, need_hidden: bool, need_weight: bool) -> "Gradients":
        """Uninitialised: a walk writes all of it, with its first block or with a block's first group of rows."""
        weight, bias = head.weight, head.bias
        return cls(
            (torch.empty if weight.shape[0] else torch.zeros)(hidden.shape, dtype=torch.float32)
            if need_hidden
            else None,
            empty_gradient(weight) if need_weight else None,
            None if bias is None else torch.empty(bias.shape, dtype=torch.float32),
        )

    def of(self, rows: slice) -> "Gradients":
        """The same for some of the rows."""
        return Gradients(None if self.hidden is None else self.hidden[rows], self.weight, self.bias)

    def add(self, cols: slice, dy: Tensor, weight: Tensor, hidden: Tensor, *, first: bool) -> None:
        """One block: dy [rows, B], the head's fp32 rows [B, H] and hidden [rows, H]. first: dW holds nothing yet."""
        if self.hidden is not None:
            _product_into(self.hidden, dy, weight, cols.start == 0)
        if self.weight is not None:
            _product_into(self.weight[cols], dy.t(), hidden, first)
        if self.bias is not None:
            if first:
                torch.sum(dy, dim=0, out=self.bias[cols])
            else:
                self.bias[cols] += dy.sum(dim=0)


def _product_into(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a b, or out += a b; a 16-bit out is rounded once, so it takes no second part."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0 if first else 1, out=out)
    else:
        assert first
        out.copy_(a @ b)


class Walk:
    """The rows that count, in fp32, and the head that they meet."""

    def __init__(self, hidden: Tensor, ids: Tensor, head: Head, tile_elements: int | None = None) -> None:
        self.hidden = hidden.to(torch.float32)
        self.ids = ids.to(torch.int64).contiguous()
        self.head, self.tile_elements = head, tile_elements

    def _blocks(self) -> Iterator[tuple[slice, Head]]:
        """Blocks of columns and their part of the head, in fp32; its logits are those before the temperature."""
        head = self.head
        for cols in column_blocks(self.hidden.shape[0], head.weight.shape[0], self.tile_elements):
            weight, bias = head.weight[cols].to(torch.float32), None if head.bias is None else head.bias[cols]
            yield cols, replace(head, weight=weight, bias=bias, temperature=1.0)

    def forward(self, tiles: Tiles, visit: Callable[[slice, Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
        """log p [N, K] and LSE [N]. Each block's logits are shown to `visit` and stay in their tile.

        Raises ValueError for ids outside of [-1, V).
        """
        (rows, num_ids), vocab = self.ids.shape, self.head.weight.shape[0]
        logprobs, lse = torch.empty(rows, num_ids, dtype=torch.float32), torch.empty(rows, dtype=torch.float32)
        peaks, sums = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.float64)
        for cols, head in self._blocks():
            z = head.logits(self.hidden, out=tiles[cols])
            status = _C.cpu_gather_tile(
                logits=z.data_ptr(),
                row_stride=z.stride(0),
                ids=self.ids.data_ptr(),
                rows=rows,
                first=cols.start,
                columns=z.shape[1],
                num_ids=num_ids,
                inv_temperature=1.0 / self.head.temperature,
                peaks=peaks.data_ptr(),
                sums=sums.data_ptr(),
                logprobs=logprobs.data_ptr(),
                lse=lse.data_ptr() if cols.stop == vocab else 0,
                threads=torch.get_num_threads(),
            )
            raise_for_status(status, "cpu_gather_tile", vocab, self.ids)
            if visit is not None:
                visit(cols, z)
        return logprobs, lse

    def backward(
        self, grad: Tensor, lse: Tensor, gradients: Gradients, stored: Tiles | None = None, *, first: bool = True
    ) -> None:
        """Gradients of sum(grad * log p), grad [N, K]; from the logits that `forward` stored, or computed again.

        first: dW and db hold nothing yet. What is stored may be overwritten.
        """
        rows, vocab = self.hidden.shape[0], self.head.weight.shape[0]
        grad, lse = grad.to(torch.float32).contiguous(), lse.contiguous()
        # Over the logits, unless they lie where dW will, or the softcap needs them again.
        softcap = self.head.softcap is not None
        out = Tiles.one(rows, vocab) if stored is None or stored.lent or softcap else stored
        again = Tiles.one(rows, vocab) if stored is None and softcap else out
        for cols, head in self._blocks():
            z = stored[cols] if stored is not None else head.logits(self.hidden, out=again[cols])
            dz = out[cols]
            status = _C.cpu_gather_logprobs_backward(
                grad=grad.data_ptr(),
                logits=z.data_ptr(),
                dtype=0,
                row_stride=z.stride(0),
                lse=lse.data_ptr(),
                ids=self.ids.data_ptr(),
                id_type=1,
                rows=rows,
                first=cols.start,
                columns=z.shape[1],
                vocab=vocab,
                num_ids=self.ids.shape[1],
                inv_temperature=1.0 / self.head.temperature,
                dlogits=dz.data_ptr(),
                out_stride=dz.stride(0),
                threads=torch.get_num_threads(),
            )
            raise_for_status(status, "cpu_gather_logprobs_backward", vocab)
            if softcap or head.logit_scale != 1.0:
                dz = head.epilogue_gradient(dz, z)
            gradients.add(cols, dz, head.weight, self.hidden, first=first)
