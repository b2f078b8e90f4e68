"""Tests hold CPU tensors. A GPU's backend gets copies on its device, as they lie in memory; what it returns comes back.

So the same tests run on every backend of the machine, values and gradients, strides and alignment. What is about the
device itself (streams, graphs, what must not wait) holds tensors on the device, and these are left alone.
"""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass, tree_flatten, tree_map, tree_unflatten

from asyncopd import backends
from asyncopd.backends.reference.head import Head

register_dataclass(Head)  # an argument with tensors in it


def install(monkeypatch: pytest.MonkeyPatch, name: str, device: str) -> None:
    """For the rest of a test, `name` runs on `device` what it is given on the CPU."""
    choose, module = backends.choose, backends.module

    def choose_carried(op: str, where: torch.device, dtype: torch.dtype) -> str:
        on_host = where.type == "cpu" and dtype != torch.float64 and backends.has_op(name, op)
        return name if on_host else choose(op, where, dtype)

    def module_carried(other: str) -> ModuleType | SimpleNamespace:
        real = module(other)
        if other != name:
            return real
        names = [key for key, value in vars(real).items() if callable(value) and key in vars(module("reference"))]
        ops = {key: carried(getattr(real, key), device) for key in names if key != "unavailable_reason"}
        return SimpleNamespace(unavailable_reason=real.unavailable_reason, **ops)

    monkeypatch.setattr(backends, "choose", choose_carried)
    monkeypatch.setattr(backends, "module", module_carried)


def carried(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` on copies. Ops that write into an argument say so by their names: they end in `_` or `_into`."""
    writes = function.__name__.endswith(("_", "_into"))

    def run(*args: Any) -> Any:
        leaves, structure = tree_flatten(args)
        if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in leaves):
            return function(*args)
        moved = [carry(x, device) if isinstance(x, Tensor) else x for x in leaves]
        out = function(*tree_unflatten(moved, structure))
        for before, after in zip(leaves, moved, strict=True):
            if isinstance(before, Tensor) and not same_bits(before, after.cpu()):
                assert writes, f"{function.__name__} changed one of its arguments"
                before.copy_(after)
        return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, out)

    return run


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN is what it is, too."""
    return torch.equal(*(x.detach().reshape(-1).contiguous().view(torch.uint8) for x in (a, b)))


def carry(tensor: Tensor, device: str) -> Tensor:
    """The whole storage, so that strides and offset stay."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
    return flat.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
