"""The exact loss by the width of its blocks, as it is and with all exponentials kept, beside the three products."""

from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor

import asyncopd
from asyncopd.backends.reference.head import Head
from asyncopd.kernels import head_loss, head_walk
from bench.measure import Call
from bench.probe.setting import BF16, Setting

TILES = (25, 26, 27)  # log2 of the elements of a block


def run(setting: Setting) -> None:
    hidden, weight = (t.detach().requires_grad_() for t in (setting.hidden, setting.weight))
    room_for = head_walk.room_for

    def all_kept(rows: int, dweight: Tensor | None, head: Head) -> list[head_walk.Kept]:
        """In dW what fits, as it is; all other rows beside it, whatever that takes."""
        kept = [part for part in room_for(rows, dweight, head) if dweight is not None][:1]
        begin, vocab = kept[0].rows.stop if kept else 0, head.weight.shape[0]
        if begin < rows:
            memory = torch.empty((rows - begin) * vocab, dtype=torch.float16, device=head.weight.device)
            kept.append(head_walk.Kept(slice(begin, rows), memory, vocab))
        return kept

    def loss(elements: int, keep_all: bool) -> Call:
        def forward_and_backward() -> None:
            hidden.grad = weight.grad = None
            with ExitStack() as stack:
                stack.enter_context(mock.patch.object(head_walk, "TILE_ELEMENTS", elements))
                if keep_all:
                    stack.enter_context(mock.patch.object(head_loss, "room_for", all_kept))
                asyncopd.linear_reverse_kl(hidden, weight, setting.support).backward()

        return forward_and_backward

    calls: dict[str, Call] = {"limit: three products": _three_products(setting)}
    for log in TILES:
        calls[f"as it is, blocks of 2^{log}"] = loss(1 << log, False)
        calls[f"all kept in fp16, blocks of 2^{log}"] = loss(1 << log, True)
    setting.compare(calls, rounds=5)


def _three_products(setting: Setting) -> Call:
    h, w = setting.hidden, setting.weight
    z = torch.empty(h.shape[0], w.shape[0], device=setting.device, dtype=BF16)
    dh, dw = torch.empty_like(h), torch.empty_like(w)

    def products() -> None:
        torch.mm(h, w.t(), out=z)
        torch.mm(z, w, out=dh)
        torch.mm(z.t(), h, out=dw)

    return products
