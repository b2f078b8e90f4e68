"""The losses inside torch.compile, autocast and nn.Module."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from each_backend import Backend, label, rounding_of_dz
from scenes import scene, support
from torch import Tensor

from asyncopd import (
    Correction,
    LinearForwardKLLoss,
    LinearReverseKLLoss,
    Support,
    forward_kl,
    gather_logprobs,
    linear_forward_kl,
    linear_reverse_kl,
    reverse_kl,
    sample_support,
)

LINEAR = ("linear_gather_logprobs", "linear_gather_logprobs_backward", "linear_gather_logits",
          "linear_gather_logits_backward", "linear_logsumexp")  # fmt: skip
GATHER = ("gather_logprobs", "gather_logprobs_backward")


def problem(backend: Backend, rng: torch.Generator, draw: str = "head_tail") -> tuple[list[Tensor], Support, Tensor]:
    s = scene(rng, vocab=13)
    sup = support(s, draw, rng)
    sup = Support(sup.ids, backend.tensor(sup.teacher_logprobs), backend.tensor(sup.log_weights), sup.draw)
    leaves = [backend.tensor(torch.randn(*shape, generator=rng).double()) for shape in ((5, 4), (13, 4), (13,))]
    return leaves, sup, torch.tensor([True, True, False, True, True])


def gradients(run: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = run(*leaves)
    out.backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED: list[tuple[str, Any, dict[str, Any]]] = [
    ("head_tail", linear_reverse_kl, {}),
    ("head_tail", linear_reverse_kl, {"baseline": "mean"}),
    ("head_tail", linear_reverse_kl, {"normalize": "sampled"}),
    ("samples", linear_reverse_kl, {"correction": Correction(clip_eps=0.2)}),
    ("teacher_top_k", linear_forward_kl, {"tail": "bucket"}),
]


@pytest.mark.ops("kl_rows", *LINEAR)
@pytest.mark.parametrize(("draw", "loss", "options"), COMPILED, ids=label)
def test_compiled_fused_losses(backend: Backend, rng: torch.Generator, draw: str, loss: Any, options: Any) -> None:
    leaves, sup, mask = problem(backend, rng, draw)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return loss(hidden, weight, sup, bias=bias, mask=mask, temperature=0.9, softcap=5.0, **options)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
    for a, b in zip(gradients(compiled, leaves), gradients(run, leaves), strict=True):
        backend.close(a, b.double())


@pytest.mark.ops("kl_rows", *GATHER)
def test_compiled_reverse_kl_that_builds_its_support(backend: Backend, rng: torch.Generator) -> None:
    leaves, sup, mask = problem(backend, rng)

    def run(logits: Tensor) -> Tensor:
        inside = Support(sup.ids, sup.teacher_logprobs, sup.log_weights, "head_tail")
        return reverse_kl(gather_logprobs(logits, sup.ids), inside, mask=mask, baseline="loo")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
    logits = leaves[0] @ leaves[1].t()
    for a, b in zip(gradients(compiled, [logits]), gradients(run, [logits]), strict=True):
        backend.close(a, b.double())


@pytest.mark.ops("sample_support", "topk_logprobs")
@pytest.mark.parametrize("by_stream", [False, True])
def test_compiled_sample_support(engine: str, rng: torch.Generator, by_stream: bool) -> None:
    def run(logits: Tensor, seed: Any, own: Tensor) -> Any:
        return tuple(sample_support(logits, num_samples=3, head=2, seed=seed, sampled_ids=own, temperature=0.8))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for rows in (4, 6):  # the second shape makes the row count dynamic
        logits, own = torch.randn(rows, 20, generator=rng), torch.randint(0, 20, (rows,), generator=rng)
        seed = torch.arange(rows) if by_stream else 5
        for a, b in zip(compiled(logits, seed, own), run(logits, seed, own), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.ops("kl_rows", *LINEAR)
@pytest.mark.parametrize("loss", [linear_reverse_kl, linear_forward_kl])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(engine: str, rng: torch.Generator, loss: Any, weight_dtype: torch.dtype) -> None:
    leaves, sup, mask = problem(Backend(engine, torch.float32), rng)
    hidden = leaves[0].bfloat16().requires_grad_()  # what a layer under autocast returns
    weight, bias = leaves[1].to(weight_dtype).requires_grad_(), leaves[2].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(hidden, weight, sup, bias=bias, mask=mask)
    value.backward()
    assert value.dtype == torch.float32
    # The same products as without autocast on weights that were rounded by hand: exact but for summation order.
    dense = [t.detach().bfloat16().double().requires_grad_() for t in (hidden, weight)]
    dense_bias = bias.detach().double().requires_grad_()
    wide = Support(sup.ids, sup.teacher_logprobs.double(), sup.log_weights.double(), sup.draw)
    plain = reverse_kl if loss is linear_reverse_kl else forward_kl
    z = dense[0] @ dense[1].t() + dense_bias
    z.retain_grad()
    expected = plain(gather_logprobs(z, sup.ids), wide, mask=mask)
    expected.backward()
    assert z.grad is not None
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    of_dz = rounding_of_dz(engine, z.grad)
    for mine, theirs, dtype, allowed in zip(
        (hidden, weight, bias),
        (*dense, dense_bias),
        (torch.bfloat16, weight_dtype, torch.float32),
        (of_dz @ dense[1].detach().abs(), of_dz.t() @ dense[0].detach().abs(), of_dz.sum(0)),
        strict=True,
    ):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == dtype
        # One rounding to bf16, of gradients down to 1e-5; on a GPU that of dz too.
        excess = (mine.grad.double() - theirs.grad).abs() - (2**-8 * theirs.grad.abs() + 1e-6 + allowed)
        assert excess.max() <= 0


@pytest.mark.ops("kl_rows", *LINEAR)
def test_autocast_leaves_fp64_alone(rng: torch.Generator) -> None:
    leaves, sup, _ = problem(Backend("reference", torch.float64), rng)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_reverse_kl(leaves[0], leaves[1], sup)
    assert inside.dtype == torch.float64
    torch.testing.assert_close(inside, linear_reverse_kl(leaves[0], leaves[1], sup))


HEAD: dict[str, Any] = {"temperature": 0.8, "logit_scale": 1.3, "softcap": 4.0}


@pytest.mark.ops("kl_rows", *LINEAR)
def test_modules_are_the_functions(backend: Backend, rng: torch.Generator) -> None:
    (hidden, weight, bias), sup, mask = problem(backend, rng, "samples")
    call: dict[str, Any] = {"mask": mask, "bias": bias}
    cases: list[dict[str, Any]] = [
        {},
        {"normalize": "sampled", **HEAD},
        {"baseline": "mean", "reduction": "sum", **HEAD},
        {"correction": Correction(clip_eps=0.2), **HEAD},
    ]
    tails: list[Any] = ["drop", "bucket", "renormalize"]
    for options in cases:
        module = LinearReverseKLLoss(**options)
        expected = linear_reverse_kl(hidden, weight, sup, **call, **options)
        backend.close(module(hidden, weight, sup, **call), expected.double())
        expected = linear_reverse_kl(hidden, weight, sup, num_items_in_batch=7, **call, **options)
        backend.close(module(hidden, weight, sup, num_items_in_batch=7, **call), expected.double())
    truncated = Support(sup.ids, sup.teacher_logprobs - 1.5, torch.zeros_like(sup.log_weights), "top_k")
    for tail in tails:
        forward = LinearForwardKLLoss(tail=tail, reduction="sum", **HEAD)
        expected = linear_forward_kl(hidden, weight, truncated, tail=tail, reduction="sum", **call, **HEAD)
        backend.close(forward(hidden, weight, truncated, **call), expected.double())
        reverse = LinearReverseKLLoss(tail=tail)
        expected = linear_reverse_kl(hidden, weight, truncated, tail=tail, **call)
        backend.close(reverse(hidden, weight, truncated, **call), expected.double())


def test_modules_print_copy_and_pickle() -> None:
    for module in (LinearReverseKLLoss(baseline="mean", softcap=3.0), LinearForwardKLLoss(tail="bucket")):
        assert "tail=" in repr(module)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(twin) == repr(module)
        assert not list(module.parameters())


@pytest.mark.ops("kl_rows", *LINEAR)
def test_gradient_checkpointing(backend: Backend, rng: torch.Generator) -> None:
    from torch.utils.checkpoint import checkpoint

    leaves, sup, mask = problem(backend, rng)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_reverse_kl(hidden, weight, sup, bias=bias, mask=mask)

    kept = gradients(run, leaves)
    recomputed = gradients(lambda *a: checkpoint(run, *a, use_reentrant=False), leaves)
    for a, b in zip(recomputed, kept, strict=True):
        backend.close(a, b.double())


@pytest.mark.ops("kl_rows", *LINEAR)
def test_gradients_only_where_they_are_asked_for(backend: Backend, rng: torch.Generator) -> None:
    (hidden, weight, bias), sup, _ = problem(backend, rng)
    hidden.requires_grad_()
    linear_reverse_kl(hidden, weight, sup, bias=bias).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert not linear_reverse_kl(hidden.detach(), weight, sup).requires_grad


def test_meta_tensors_go_through_the_fused_losses() -> None:
    """A dry run on the meta device gives shapes and gradients of shapes."""
    hidden = torch.empty(4, 5, device="meta", requires_grad=True)
    weight = torch.empty(9, 5, device="meta", requires_grad=True)
    ids, scores = torch.empty(4, 3, dtype=torch.int64, device="meta"), torch.empty(4, 3, device="meta")
    sup = Support(ids, scores, scores, "samples")
    for loss in (linear_reverse_kl, linear_forward_kl):
        loss(hidden, weight, sup).backward()
    assert weight.grad is not None
    assert weight.grad.shape == (9, 5)
