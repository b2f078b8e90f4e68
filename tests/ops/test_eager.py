"""An eager call goes straight to its backend, and a traced one through the custom op: with the same bits and manners.

An empty `TorchDispatchMode` has a call take the op's way.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from each_backend import Backend, label
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from asyncopd import (
    Correction,
    Support,
    forward_kl,
    gather_logprobs,
    linear_forward_kl,
    linear_gather_logprobs,
    linear_reverse_kl,
    linear_topk_logprobs,
    reverse_kl,
    sample_support,
    topk_logprobs,
)
from asyncopd.ops import linear_gather_logits_into
from asyncopd.ops.eager import plain

N, V, H, K = 6, 29, 5, 4
OPS = ("topk_logprobs", "linear_topk_logprobs", "sample_support", "gather_logprobs", "gather_logprobs_backward",
       "linear_gather_logprobs", "linear_gather_logprobs_backward", "linear_gather_logits",
       "linear_gather_logits_backward", "linear_logsumexp", "linear_kl", "kl_rows", "kl_loss")  # fmt: skip
pytestmark = pytest.mark.ops(*OPS)


class Intercepted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func.name())
        return func(*args, **(kwargs or {}))


class Given:
    """What the calls below take, in a backend's dtype."""

    def __init__(self, backend: Backend, rng: torch.Generator) -> None:
        def normal(*shape: int) -> Tensor:
            return backend.tensor(torch.randn(*shape, generator=rng, dtype=torch.float64))

        self.logits, self.hidden, self.weight, self.bias = normal(N, V), normal(N, H), normal(V, H), normal(V)
        self.ids = torch.randint(0, V, (N, K), generator=rng)
        self.ids[1, 2] = -1
        self.scores = normal(N, K).log_softmax(1)
        self.mask = torch.tensor([True, True, False, True, True, True])
        self.support = Support(self.ids, normal(N, K).log_softmax(1), 0.3 * normal(N, K), "samples")
        self.items = torch.tensor(3.0)


Step = tuple[Callable[..., Any], Callable[[Given], tuple[Tensor, ...]]]
EXTRACT: list[Callable[[Given], Any]] = [
    lambda g: topk_logprobs(g.logits, 3, temperature=0.7),
    lambda g: linear_topk_logprobs(g.hidden, g.weight, 3, bias=g.bias, softcap=4.0),
    lambda g: sample_support(g.logits, num_samples=3, head=1, seed=5),
]
HEAD = {"temperature": 0.8, "logit_scale": 1.3, "softcap": 4.0}


def scores_of(g: Given) -> tuple[Tensor, ...]:
    return (g.scores,)


def logits_of(g: Given) -> tuple[Tensor, ...]:
    return (g.logits,)


def head_of(g: Given) -> tuple[Tensor, ...]:
    return g.hidden, g.weight, g.bias


def on_scores(loss: Any, **options: Any) -> Step:
    return lambda g, scores: loss(scores, g.support, mask=g.mask, **options), scores_of


def on_head(loss: Any, **options: Any) -> Step:
    return (lambda g, h, w, b: loss(h, w, g.support, mask=g.mask, bias=b, **HEAD, **options)), head_of


STEPS: dict[str, Step] = {
    "gather": (lambda g, logits: gather_logprobs(logits, g.ids, temperature=0.7), logits_of),
    "linear gather": (lambda g, h, w, b: linear_gather_logprobs(h, w, g.ids, bias=b, **HEAD), head_of),
    "reverse": on_scores(reverse_kl),
    "reverse sum": on_scores(reverse_kl, reduction="sum", baseline="loo"),
    "reverse none": on_scores(reverse_kl, reduction="none", baseline="mean"),
    "reverse items": on_scores(reverse_kl, num_items_in_batch=7, normalize="sampled"),
    "reverse items in a tensor": on_scores(reverse_kl, num_items_in_batch=torch.tensor(11)),
    "reverse budget": on_scores(reverse_kl, correction=Correction(m2_budget=0.01)),
    "forward": on_scores(forward_kl),
    "head": on_head(linear_reverse_kl),
    "head forward": on_head(linear_forward_kl, reduction="sum"),
    "head sampled": on_head(linear_reverse_kl, normalize="sampled"),
    "head mean": on_head(linear_reverse_kl, baseline="mean"),
    "head none": on_head(linear_reverse_kl, reduction="none"),
    "head clip": on_head(linear_reverse_kl, correction=Correction(clip_eps=0.2)),
}
EACH_STEP = pytest.mark.parametrize("name", STEPS)


def run(g: Given, name: str, upstream: Any = None, **grad_options: Any) -> list[Tensor]:
    """A step's value and its gradients."""
    function, leaves_of = STEPS[name]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(g)]
    out = function(g, *leaves)
    factors = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape) if upstream is None else upstream(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, factors, **grad_options)]


def assert_same(got: Any, expected: Any) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("call", EXTRACT)
def test_extraction(backend: Backend, rng: torch.Generator, call: Callable[[Given], Any]) -> None:
    g = Given(backend, rng)
    straight = call(g)
    with Intercepted() as mode:
        intercepted = call(g)
    assert any(op.startswith("asyncopd::") for op in mode.ops)
    assert_same(tuple(straight), tuple(intercepted))


@EACH_STEP
def test_values_and_gradients(backend: Backend, rng: torch.Generator, name: str) -> None:
    g = Given(backend, rng)
    straight = run(g, name)
    with Intercepted() as mode:
        intercepted = run(g, name)
    assert any(op.startswith("asyncopd::") for op in mode.ops)
    assert_same(straight, intercepted)


@EACH_STEP
def test_an_eager_call_passes_the_dispatcher_by(
    backend: Backend, rng: torch.Generator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("an op of torch.library")

    for op in ("gather._gather", "linear_gather._linear_gather", "linear_gather._linear_logits", "kl.kl_rows",
               "linear_gather._linear_logsumexp", "kl.kl_loss", "linear_kl.linear_kl"):  # fmt: skip
        monkeypatch.setattr(f"asyncopd.ops.{op}", refused)
    g = Given(backend, rng)
    run(g, name)
    with torch.no_grad():
        function, leaves_of = STEPS[name]
        function(g, *leaves_of(g))


@EACH_STEP
def test_a_default_device_is_not_where_results_are(backend: Backend, rng: torch.Generator, name: str) -> None:
    g = Given(backend, rng)
    expected = run(g, name)
    factors = torch.linspace(-1, 2, expected[0].numel(), dtype=expected[0].dtype).view(expected[0].shape)
    with torch.device("meta"):
        got = run(g, name, lambda out: factors)
    assert_same(got, expected)


@EACH_STEP
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend: Backend, rng: torch.Generator, name: str, mode: Any) -> None:
    g = Given(backend, rng)
    function, leaves_of = STEPS[name]
    expected = run(g, name)[0]
    with mode():
        got = function(g, *(leaf.clone().requires_grad_() for leaf in leaves_of(g)))
    assert not got.requires_grad
    # The exact loss through the head is summed in other tiles where no gradient is made.
    torch.testing.assert_close(got, expected, rtol=1e-5 if name.startswith("head") else 0, atol=0)
    assert_same([function(g, *(leaf.detach() for leaf in leaves_of(g)))], [got])


# -------------------------------------------------------------------------------------- upstream gradients


@EACH_STEP
@pytest.mark.parametrize("kind", ["ones", "expanded", "strided", "zero", "scaled"])
def test_upstream_gradients(backend: Backend, rng: torch.Generator, name: str, kind: str) -> None:
    """Whatever the backward brings is a factor; what the caller dropped has gradient 0."""

    def upstream(out: Tensor) -> Tensor:
        if kind == "expanded":
            return torch.ones((), dtype=out.dtype).expand(out.shape)
        if kind == "strided" and out.dim():
            return torch.linspace(-1, 2, 2 * out.numel(), dtype=out.dtype).view(*out.shape[:-1], -1)[..., ::2]
        return torch.full_like(out, {"zero": 0.0, "scaled": -3.0}.get(kind, 1.0))

    g = Given(backend, rng)
    got = run(g, name, upstream)
    with Intercepted():
        assert_same(got, run(g, name, upstream))
    if kind == "zero":
        assert all((gradient == 0).all() for gradient in got[1:])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dropped_losses_have_no_gradient_even_where_they_are_nan(
    backend: Backend, rng: torch.Generator, reduction: Any
) -> None:
    g = Given(backend, rng)
    g.scores[0] = torch.nan
    scores = g.scores.requires_grad_()
    loss = reverse_kl(scores, g.support, reduction=reduction)
    keep = torch.ones_like(loss)
    keep.view(-1)[0] = 0.0
    (gradient,) = torch.autograd.grad(loss, scores, keep)
    assert (gradient[0] == 0).all()
    assert (gradient == 0).all() == (reduction == "mean")


# ------------------------------------------------------------------------------------------- graphs


@EACH_STEP
def test_a_retained_graph_gives_the_same_gradients_again(backend: Backend, rng: torch.Generator, name: str) -> None:
    """Also where the factor differs, and where the first gradients have been changed since."""
    g = Given(backend, rng)
    function, leaves_of = STEPS[name]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(g)]
    out = function(g, *leaves)
    for factor in (1.0, -2.0, 0.0, 1.0):
        gradients = torch.autograd.grad(out, leaves, torch.full_like(out, factor), retain_graph=True)
        fresh = run(g, name, lambda out, factor=factor: torch.full_like(out, factor))[1:]
        assert_same(gradients, fresh)
        for gradient in gradients:
            gradient.fill_(7.0)


@EACH_STEP
def test_gradients_that_are_kept_add_up(backend: Backend, rng: torch.Generator, name: str) -> None:
    g = Given(backend, rng)
    function, leaves_of = STEPS[name]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(g)]
    out = function(g, *leaves).sum()
    out.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    out.backward()
    for leaf, first in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * first)


@EACH_STEP
def test_a_freed_graph_is_told(backend: Backend, rng: torch.Generator, name: str) -> None:
    g = Given(backend, rng)
    function, leaves_of = STEPS[name]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(g)]
    out = function(g, *leaves).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


@EACH_STEP
@pytest.mark.parametrize("way", [nullcontext, Intercepted])
def test_a_second_derivative_is_refused(
    backend: Backend, rng: torch.Generator, name: str, way: Callable[[], AbstractContextManager[Any]]
) -> None:
    """The gradients have no graph, and a penalty on them would be a constant. They themselves are right."""
    g = Given(backend, rng)
    expected = run(g, name)
    with way():
        got = run(g, name, create_graph=True)
        assert_same([x.detach() for x in got], expected)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            got[1].pow(2).sum().backward()


@EACH_STEP
@pytest.mark.parametrize("wanted", range(3))
def test_only_what_is_asked_for(backend: Backend, rng: torch.Generator, name: str, wanted: int) -> None:
    g = Given(backend, rng)
    function, leaves_of = STEPS[name]
    whole = run(g, name)[1:]
    if wanted >= len(whole):
        pytest.skip("has fewer inputs that learn")
    leaves = [leaf.detach().requires_grad_(i == wanted) for i, leaf in enumerate(leaves_of(g))]
    out = function(g, *leaves)
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape))
    assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(len(leaves))]
    # Not bit for bit: products of other shapes.
    torch.testing.assert_close(leaves[wanted].grad, whole[wanted])


@EACH_STEP
def test_hooks_see_gradients_and_may_replace_them(backend: Backend, rng: torch.Generator, name: str) -> None:
    g = Given(backend, rng)
    function, leaves_of = STEPS[name]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(g)]
    seen = []
    for leaf in leaves:
        leaf.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)  # type: ignore[func-returns-value]
    out = function(g, *leaves)
    out.register_hook(lambda gradient: 3 * gradient)
    out.sum().backward()
    expected = run(g, name, lambda out: torch.full_like(out, 3.0))[1:]
    assert len(seen) == len(leaves)
    for leaf, want in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * want)


@EACH_STEP
def test_checkpoints_and_offloading(backend: Backend, rng: torch.Generator, name: str) -> None:
    g = Given(backend, rng)
    function, leaves_of = STEPS[name]
    expected = run(g, name)[1:]

    def graded(call: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(g)]
        # Something between the leaves and the call, so that there is something to compute again.
        out = call(*(leaf * 1 for leaf in leaves))
        factors = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        return list(torch.autograd.grad(out, leaves, factors))

    assert_same(graded(lambda *t: checkpoint(lambda *u: function(g, *u), *t, use_reentrant=False)), expected)
    with save_on_cpu():
        assert_same(graded(lambda *t: function(g, *t)), expected)
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        assert_same(graded(lambda *t: function(g, *t)), expected)


@EACH_STEP
def test_a_backward_under_a_mode_takes_the_ops(backend: Backend, rng: torch.Generator, name: str) -> None:
    """Of a graph that was made without one: flop counters and selective checkpoints come and go."""
    g = Given(backend, rng)
    function, leaves_of = STEPS[name]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves_of(g)]
    out = function(g, *leaves)
    factors = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    with Intercepted():
        got = torch.autograd.grad(out, leaves, factors)
    assert_same(got, run(g, name)[1:])


# ------------------------------------------------------------------------------------------- autocast


@EACH_STEP
def test_autocast(engine: str, rng: torch.Generator, name: str) -> None:
    """The products of a backend stay what they are; those of a head take the inputs that autocast gives them."""
    g = Given(Backend(engine, torch.float32), rng)
    expected = run(g, name)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(g, name)
        with Intercepted():
            assert_same(got, run(g, name))
    if name.startswith(("linear", "head")):
        g.hidden, g.weight = g.hidden.bfloat16().float(), g.weight.bfloat16().float()
        torch.testing.assert_close(got[0], run(g, name)[0], rtol=1e-5, atol=1e-5)
    else:
        assert_same(got, expected)


# ------------------------------------------------------------------------------ who may call a backend straight


class Other(Tensor):
    pass


def test_what_is_plain(backend: Backend) -> None:
    x = torch.ones(2)
    assert plain(x, torch.nn.Parameter(x), None, x.clone().requires_grad_())
    assert not plain(x, x.as_subclass(Other))
    assert not plain(torch.empty(2, device="meta"))
    with Intercepted():
        assert not plain(x)
    with torch.device("cpu"):
        assert not plain(x)
    with torch.autograd.forward_ad.dual_level():
        assert not plain(x)
    inside: list[bool] = []
    torch.func.vmap(lambda t: inside.append(plain(t)) or t)(x)  # type: ignore[func-returns-value]
    torch.func.grad(lambda t: inside.append(plain(t)) or t.sum())(x)  # type: ignore[func-returns-value]
    assert inside == [False, False]
    assert plain(x)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vjp], ids=label)
@pytest.mark.parametrize("name", ["gather", "reverse", "reverse none", "head"])
def test_gradients_of_torch_func_are_refused(backend: Backend, rng: torch.Generator, name: str, transform: Any) -> None:
    """By the ops, since functorch takes no `torch.autograd.Function` of theirs; and never computed as constants."""
    g = Given(backend, rng)
    function, leaves_of = STEPS[name]
    leaves = leaves_of(g)
    arguments = () if transform is torch.func.vjp else leaves
    with pytest.raises(RuntimeError, match="functorch"):
        transform(lambda *t: function(g, *t).sum(), *leaves[: len(leaves) - len(arguments)])(*arguments)


@pytest.mark.parametrize("name", ["gather", "reverse none", "head none"])
def test_vmap_is_a_loop(backend: Backend, rng: torch.Generator, name: str) -> None:
    g = Given(backend, rng)
    function, leaves_of = STEPS[name]
    leaves = leaves_of(g)
    batched = torch.func.vmap(lambda *t: function(g, *t))(*(torch.stack([leaf, leaf + 1]) for leaf in leaves))
    for i, out in enumerate(batched):
        assert_same([out], [function(g, *(leaf + i for leaf in leaves))])


@pytest.mark.ops("linear_gather_logits", "linear_gather_logits_backward_into")
def test_buffers_that_a_backward_adds_to_have_a_new_version(engine: str, rng: torch.Generator) -> None:
    """Autograd then knows that whoever saved one of them as it was can no longer use it."""
    g = Given(Backend(engine, torch.float32), rng)
    hidden = g.hidden.requires_grad_()
    totals = []
    for way in (nullcontext, Intercepted):
        dweight, dbias = torch.zeros_like(g.weight), torch.zeros_like(g.bias)
        before = dweight._version, dbias._version
        with way():
            logits = linear_gather_logits_into(hidden, g.weight, g.ids, dweight, bias=g.bias, bias_grad=dbias)
            logits.masked_fill(g.ids < 0, 0.0).sum().backward()
        assert dweight._version > before[0]
        assert dbias._version > before[1]
        totals.append((dweight, dbias))
    assert_same(totals[0], totals[1])
