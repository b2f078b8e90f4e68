"""A loss with its gradients in a CUDA graph: captured once, replayed with new inputs in the same memory.

What needs no GPU is tests/ops/test_capture.py, op by op, and here, that the losses themselves read no data.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from each_backend import DEVICES, label
from torch import Tensor

from asyncopd import Support, forward_kl, gather_logprobs, linear_forward_kl, linear_reverse_kl, reverse_kl

N, V, H, K = 40, 300, 16, 8
LINEAR = ("linear_gather_logprobs", "linear_gather_logprobs_backward", "linear_gather_logits",
          "linear_gather_logits_backward", "linear_logsumexp", "linear_kl")  # fmt: skip
OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (linear_reverse_kl, {}),
    (linear_reverse_kl, {"baseline": "loo", "temperature": 0.8, "logit_scale": 1.3, "softcap": 5.0}),
    (linear_reverse_kl, {"baseline": "mean"}),
    (linear_reverse_kl, {"normalize": "sampled"}),
    (linear_reverse_kl, {"reduction": "none"}),
    (linear_forward_kl, {}),
]


def inputs(seed: int, device: str) -> dict[str, Tensor]:
    """Everything that changes from step to step, the number of valid rows included."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (N, K), generator=rng)
    ids[seed % N, 3:] = -1
    values = {
        "hidden": torch.randn(N, H, generator=rng),
        "weight": torch.randn(V, H, generator=rng),
        "ids": ids,
        "teacher": torch.randn(N, K, generator=rng).log_softmax(1),
        "log_weights": 0.3 * torch.randn(N, K, generator=rng),
        "mask": torch.rand(N, generator=rng) < 0.3 + 0.1 * seed,
        "items": torch.tensor(10.0 + seed),
    }
    return {name: value.to(device) for name, value in values.items()}


def fused(loss: Any, options: dict[str, Any]) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    def step(held: dict[str, Tensor]) -> list[Tensor]:
        leaves = [held[name].detach().requires_grad_() for name in ("hidden", "weight")]
        support = Support(held["ids"], held["teacher"], held["log_weights"], "samples")
        items = None if options.get("reduction") == "none" else held["items"]
        out = loss(*leaves, support, mask=held["mask"], num_items_in_batch=items, **options)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    return step


def gathered(loss: Any) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    def step(held: dict[str, Tensor]) -> list[Tensor]:
        leaf = (held["hidden"] @ held["weight"].t()).requires_grad_()
        support = Support(held["ids"], held["teacher"], held["log_weights"], "samples")
        out = loss(gather_logprobs(leaf, held["ids"]), support, mask=held["mask"], num_items_in_batch=held["items"])
        return [out.detach(), *torch.autograd.grad(out, [leaf])]

    return step


def assert_replays(step: Callable[[dict[str, Tensor]], list[Tensor]], engine: str) -> None:
    if DEVICES.get(engine) != "cuda":
        pytest.skip("no kernels of a GPU")
    held = inputs(0, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is compiled, tuned or allocated once
            step(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(held)
    for seed in (1, 2, 0):
        new = inputs(seed, "cuda")
        for name, value in new.items():
            held[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for got, expected in zip(results, step(new), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.ops("kl_rows", *LINEAR)
@pytest.mark.parametrize(("loss", "options"), OPTIONS, ids=label)
def test_a_fused_loss_replays(engine: str, loss: Any, options: dict[str, Any]) -> None:
    assert_replays(fused(loss, options), engine)


@pytest.mark.gpu
@pytest.mark.ops("kl_rows", "gather_logprobs", "gather_logprobs_backward")
@pytest.mark.parametrize("loss", [reverse_kl, forward_kl])
def test_a_loss_on_gathered_scores_replays(engine: str, loss: Any) -> None:
    assert_replays(gathered(loss), engine)


@pytest.mark.parametrize("step", [*(fused(*option) for option in OPTIONS), gathered(reverse_kl), gathered(forward_kl)])
def test_a_step_reads_no_data(step: Callable[[dict[str, Tensor]], list[Tensor]]) -> None:
    """On meta tensors, which have none; and nothing is left out there."""
    expected, got = step(inputs(1, "cpu")), step(inputs(1, "meta"))
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")
    assert any(t.any() for t in expected[1:])
