"""Triton kernels, one family a file; installed and imported as `asyncopd.kernels`.

Functions named as ops are what the `triton` backend runs; each has the reference's arguments. They launch on the
tensors' device and its current stream, without synchronising. TRITON_INTERPRET=1, set before the first import, runs
them on the CPU, slowly, for tests. Block sizes come from the cost models in the modules; ASYNCOPD_AUTOTUNE=FILE has
those of the products measured, and records the choices (tuning.py).

An earlier version of these kernels ran on an H100. This one has been interpreted, compiled ahead of time and launched
with a stand-in driver; `bench/gpu.sh` runs it on a GPU.
"""

import importlib.util

import torch

if importlib.util.find_spec("triton") is not None:
    from asyncopd.kernels.gather import gather_logprobs, gather_logprobs_backward
    from asyncopd.kernels.head import linear_gather_logprobs, linear_gather_logprobs_backward, linear_logsumexp
    from asyncopd.kernels.head_loss import linear_kl
    from asyncopd.kernels.kl import kl_loss, kl_rows
    from asyncopd.kernels.linear_topk import linear_topk_logprobs
    from asyncopd.kernels.sample import sample_support
    from asyncopd.kernels.scale import scale_gradient_
    from asyncopd.kernels.scale_rows import scale_rows_
    from asyncopd.kernels.sparse_head import (
        linear_gather_logits,
        linear_gather_logits_backward,
        linear_gather_logits_backward_into,
    )
    from asyncopd.kernels.topk import topk_logprobs

    __all__ = [
        "gather_logprobs",
        "gather_logprobs_backward",
        "kl_loss",
        "kl_rows",
        "linear_gather_logits",
        "linear_gather_logits_backward",
        "linear_gather_logits_backward_into",
        "linear_gather_logprobs",
        "linear_gather_logprobs_backward",
        "linear_kl",
        "linear_logsumexp",
        "linear_topk_logprobs",
        "sample_support",
        "scale_gradient_",
        "scale_rows_",
        "topk_logprobs",
        "unavailable_reason",
    ]


def unavailable_reason() -> str | None:
    """Why the `triton` backend cannot run an op here, as a sentence; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'asyncopd[triton]')"
    from asyncopd.kernels.launch import INTERPRET

    if not INTERPRET and not torch.cuda.is_available():
        return "torch finds no CUDA device (with TRITON_INTERPRET=1 the kernels run on the CPU, slowly)"
    return None
