"""The sampled loss by the width of its slices: narrow ones stay in half of the L2."""

from unittest import mock

import asyncopd
from asyncopd.kernels import sparse_rows
from bench.measure import Call
from bench.probe.setting import Setting

SLICES, DRY_SLICES = (64, 128, 256, 512), (64, 256)


def run(setting: Setting) -> None:
    hidden, weight = (t.detach().requires_grad_() for t in (setting.hidden, setting.weight))

    def of_slice(width: int) -> Call:
        def forward_and_backward() -> None:
            hidden.grad = weight.grad = None
            with mock.patch.object(sparse_rows, "SLICES", (width,)):
                asyncopd.linear_reverse_kl(
                    hidden, weight, setting.support, normalize="sampled", baseline="mean"
                ).backward()

        return forward_and_backward

    slices = DRY_SLICES if setting.dry else SLICES
    setting.compare({f"slice of {width}": of_slice(width) for width in slices})
