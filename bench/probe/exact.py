"""The exact loss by the width of its blocks, as it is and with all exponentials kept, beside the three products."""

from unittest import mock

import torch

import asyncopd
from asyncopd.kernels import head_walk
from bench.measure import Call
from bench.probe.setting import BF16, Setting

TILES = (25, 26, 27)  # log2 of the elements of a block


def run(setting: Setting) -> None:
    hidden, weight = (t.detach().requires_grad_() for t in (setting.hidden, setting.weight))
    everything = 2 * setting.shape.rows * setting.shape.vocab + 2**30  # bytes: two for an exponential

    def loss(elements: int, kept_bytes: int) -> Call:
        def forward_and_backward() -> None:
            hidden.grad = weight.grad = None
            with mock.patch.multiple(head_walk, TILE_ELEMENTS=elements, KEPT_BYTES=kept_bytes):
                asyncopd.linear_reverse_kl(hidden, weight, setting.support).backward()

        return forward_and_backward

    calls: dict[str, Call] = {"limit: three products": _three_products(setting)}
    for log in TILES:
        calls[f"as it is, blocks of 2^{log}"] = loss(1 << log, head_walk.KEPT_BYTES)
        calls[f"all kept in fp16, blocks of 2^{log}"] = loss(1 << log, everything)
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
