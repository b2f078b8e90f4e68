"""torch.library.opcheck of every op: schema, fake kernel, autograd registration, tracing with dynamic shapes."""

from typing import Any

import pytest
import torch
from each_backend import DEVICES, runs
from torch.library import opcheck

from asyncopd import backends
from asyncopd.backends.loss_spec import LossSpec

OPS = torch.ops.asyncopd
N, V, H, K = 4, 13, 3, 5


def f32(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


IDS = torch.randint(0, V, (N, K), generator=torch.Generator().manual_seed(0))
IDS[1, 2] = -1
MASK = torch.tensor([True, False, True, True])
LSE = f32(N)
PLAIN, FULL = (None, None, 1.0, 1.0, None), (f32(V), MASK, 0.7, 1.3, 4.0)
EXTRACT_PLAIN, EXTRACT_FULL = (None, 1.0, 1.0, None), (f32(V), 0.7, 1.3, 4.0)
LOGP, LOGQ, LOGW = (f32(N, V).log_softmax(1)[:, :K] for _ in range(3))
CERTAIN = (LOGP, LOGQ, torch.zeros(N, K), IDS, None, None)
DRAWN = (LOGP, LOGQ, LOGW, IDS, MASK, None)
KL: list[tuple[tuple[Any, ...], LossSpec]] = [
    ((LOGP, LOGQ, LOGW, IDS, None, None), LossSpec()),
    (
        (LOGP, LOGQ, LOGW, IDS, MASK, LOGQ),
        LossSpec(normalize="sampled", baseline="loo", head_is_certain=False, needs_policy=True, advantage="behavior",
                 clip_eps=0.2),
    ),
    (DRAWN, LossSpec(baseline="mean", head_is_certain=False, needs_policy=True, m2_budget=0.04)),
    (DRAWN, LossSpec(head_is_certain=False, needs_policy=True, ratio_cap=1.5)),
    (CERTAIN, LossSpec(tail="bucket")),
    (DRAWN, LossSpec(divergence="forward")),
    (CERTAIN, LossSpec(divergence="forward", tail="renormalize")),
]  # fmt: skip

CASES: list[tuple[str, tuple[Any, ...]]] = [
    ("topk_logprobs", (f32(N, V), K, 0.7)),
    ("topk_logprobs", (f32(N, V).bfloat16(), 1, 1.0)),
    ("linear_topk_logprobs", (f32(N, H), f32(V, H), K, *EXTRACT_PLAIN)),
    ("linear_topk_logprobs", (f32(N, H), f32(V, H), K, *EXTRACT_FULL)),
    ("gather_logprobs", (f32(N, V), IDS, 0.7)),
    ("gather_logprobs", (f32(N, V).bfloat16(), IDS.int(), 1.0)),
    ("gather_logprobs_backward", (f32(N, K), f32(N, V), LSE, IDS, 0.7)),
    *((name, (f32(N, H), f32(V, H), IDS, *head)) for name in ("linear_gather_logprobs", "linear_gather_logits")
      for head in (PLAIN, FULL)),
    *(("linear_gather_logprobs_backward", (f32(N, K), f32(N, H), f32(V, H), LSE, IDS, *h, h is FULL))
      for h in (PLAIN, FULL)),
    *(("linear_gather_logits_backward", (f32(N, K), f32(N, K), f32(N, H), f32(V, H), IDS, *h, h is FULL))
      for h in (PLAIN, FULL)),
    ("linear_gather_logits_backward_into",
     (f32(N, K), f32(N, K), f32(N, H), f32(V, H), IDS, None, 1.0, 1.0, None, f32(V, H), None)),
    ("linear_gather_logits_backward_into",
     (f32(N, K), f32(N, K), f32(N, H), f32(V, H), IDS, MASK, 0.7, 1.3, 4.0, f32(V, H).bfloat16(), f32(V))),
    ("linear_logsumexp", (f32(N, H), f32(V, H), *FULL)),
    *(("kl_rows", (*args, spec.text)) for args, spec in KL),
    *(("kl_loss", (*args, by, spec.text)) for args, spec in KL for by in (None, torch.tensor(3.0), torch.tensor(0.0))),
    ("linear_kl", (f32(N, H), f32(V, H), None, None, IDS, LOGQ, LOGW, None, torch.tensor(4.0), 1.0, 1.0, None,
                   True, True, LossSpec().text)),
    ("linear_kl", (f32(N, H), f32(V, H), f32(V), MASK, IDS, LOGQ, LOGW, LOGP, torch.tensor(3), 0.7, 1.3, 4.0,
                   True, True, LossSpec(head_is_certain=False, needs_policy=True, clip_eps=0.2).text)),
    ("sample_support", (f32(N, V), 4, 2, 3, None, None, 0.7)),
    ("sample_support", (f32(N, V), 4, 0, 0, torch.arange(N), torch.arange(N), 1.0)),
]  # fmt: skip
DIFFERENTIABLE = (
    "gather_logprobs",
    "linear_gather_logprobs",
    "linear_gather_logits",
    "kl_rows",
    "kl_loss",
    "linear_kl",
)


def with_gradients(args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The first `count` tensors as leaves that need gradients."""
    return tuple(
        a.clone().requires_grad_() if i < count and isinstance(a, torch.Tensor) else a for i, a in enumerate(args)
    )


@pytest.mark.parametrize(("name", "args"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name: str, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCOPD_BACKEND", "reference")
    op = getattr(OPS, name).default
    if name in DIFFERENTIABLE:
        args = with_gradients(args, 2 if name.startswith("linear") else 1)
    opcheck(op, args)


def test_every_op_of_the_library_is_checked() -> None:
    # The dispatcher's own list: an op that somebody adds needs a case above.
    registered = {
        schema.name.split("::")[1] for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("asyncopd::")
    }
    assert registered == {name for name, _ in CASES}


def op_cases(*names: str) -> list[Any]:
    """Every case on each of these backends that has the op, as (backend, op, arguments)."""
    return [
        pytest.param(backend, name, args, id=f"{backend}-{name}-{i}")
        for backend in names
        if runs(backend)
        for i, (name, args) in enumerate(CASES)
        if backends.has_op(backend, name)
    ]


def moved(args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """Copies of the tensors on a device."""
    return tuple(a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in args)


@pytest.mark.parametrize(("runner", "name", "args"), op_cases("cpu", "triton", "cuda"))
def test_every_backend_returns_what_the_fake_says(
    runner: str, name: str, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes, dtypes, strides and devices, and that inputs stay as they are."""
    monkeypatch.setenv("ASYNCOPD_BACKEND", runner)
    args = moved(args, DEVICES.get(runner, "cpu"))
    opcheck(getattr(OPS, name).default, args, test_utils=("test_schema", "test_faketensor"))
