"""Whether an op may call its backend straight, without torch's dispatcher, and what such a call owes autograd.

The custom ops are for what has to see an op as one call: torch.compile, fake tensors, functorch, dispatch and function
modes. An ordinary eager step has none of these, and the dispatcher's Python would cost several times what a small
kernel takes: there an op is its backend's function, or one `torch.autograd.Function`. Both ways give the same bits
and the same behaviour.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# These names of torch are private. In a version of torch that lacks one, every call goes through the custom ops, which
# is slower and gives the same results.
try:
    from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._functorch import peek_interpreter_stack

    _CAN_TELL = hasattr(forward_ad, "_current_level")
except ImportError:
    _CAN_TELL = False

_Backward = Callable[..., tuple[Tensor | None, ...]]
_PLAIN = (Tensor, torch.nn.Parameter)


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors with data, in a call that nothing traces, transforms or intercepts."""
    if (
        not _CAN_TELL
        or torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()  # fake tensors, make_fx, selective checkpointing, flop counters
        or _len_torch_function_stack()  # a default device, say: backends would allocate on it
        or peek_interpreter_stack() is not None  # vmap, grad, jvp and functionalize of torch.func
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    ):
        return False
    try:
        for tensor in tensors:
            if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta or _has_no_data(tensor)):
                return False
    except RuntimeError:  # a batched tensor of the older vmap (is_grads_batched=True) has no address
        return False
    return True


def _has_no_data(tensor: Tensor) -> bool:
    """Whether its memory does not hold its values: zero tensors, functional wrappers, views that negate."""
    return tensor.is_neg() or (tensor.data_ptr() == 0 and tensor.numel() > 0)


def save_tensors(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, also for tensors made under inference_mode (a teacher's scores, say).

    Autograd refuses to save those, because they have no version by which it would see a change. Outside of
    inference_mode nothing can change them, so the context keeps them as they are.
    """
    kept = tuple(t if t is not None and t.is_inference() else None for t in tensors)
    ctx.inference_tensors = kept if any(t is not None for t in kept) else None
    ctx.save_for_backward(*(t if k is None else None for t, k in zip(tensors, kept, strict=True)))


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """The tensors, or None, that `save_tensors` or `ctx.save_for_backward` saved, in the same order."""
    kept = getattr(ctx, "inference_tensors", None)
    if kept is None:
        return tuple(ctx.saved_tensors)
    return tuple(s if k is None else k for s, k in zip(ctx.saved_tensors, kept, strict=True))


def first_order(name: str) -> Callable[[_Backward], _Backward]:
    """Of a backward that computes without a graph: differentiating its gradients raises an error.

    Autograd would take them for constants. With create_graph=True gradients are enabled in a backward. (Unlike
    torch's `once_differentiable`, which says nothing where the upstream gradient itself needs no gradient.)
    """

    def decorate(backward: _Backward) -> _Backward:
        def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                gradients = backward(ctx, *grads)
            return _without_derivative(name, gradients)

        return run

    return decorate


def _without_derivative(name: str, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    given = [g.detach().requires_grad_() for g in gradients if g is not None]
    if not given:
        return gradients
    error: Any = torch._C._functions.DelayedError(f"{name}: has no second derivative".encode(), len(given))
    refused = error(*given)
    left = iter(refused if isinstance(refused, tuple) else (refused,))
    return tuple(None if g is None else next(left) for g in gradients)
