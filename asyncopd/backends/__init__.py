"""Which implementation runs an op: chosen by device and dtype, forced by ASYNCOPD_BACKEND, never changed in silence."""

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch

_MODULES = {
    "reference": "asyncopd.backends.reference",
    "cpu": "asyncopd.backends.cpu",
    "triton": "asyncopd.kernels",
    "cuda": "asyncopd.backends.cuda",
}
BACKENDS = tuple(_MODULES)
# Triton's interpreter takes the place of a device.
_DEVICE = {"cpu": "cpu", "triton": "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda", "cuda": "cuda"}
# Chosen without being asked for, best first. Not `cuda`: on an H100 its two ops were slower than those of `triton`.
_AUTOMATIC = ("cpu", "triton")


# The dict that os.environ keeps, and the variable's name in it: 0.05 us, where os.environ.get takes 1 if there is none.
_environment: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_FORCED = os.environ.encodekey("ASYNCOPD_BACKEND") if _environment is not os.environ else "ASYNCOPD_BACKEND"


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


@cache
def module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


@cache
def unavailable_reason(name: str) -> str | None:
    """Why `name` cannot run on this machine, or None."""
    return module(name).unavailable_reason()


def has_op(name: str, op: str) -> bool:
    return callable(getattr(module(name), op, None))


def select(op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The function that runs `op` on tensors of this device and dtype, at the precision that it was written for."""
    kind = device.type
    # Everything that a choice depends on; the functions, because tests put others in their places.
    chosen = _chosen(op, kind, dtype, _environment.get(_FORCED), choose, module, unavailable_reason)
    function: Callable[..., Any] = getattr(chosen, op)
    return _without_autocast(function, kind) if torch.is_autocast_enabled(kind) else function


@cache
def _chosen(op: str, kind: str, dtype: torch.dtype, *_: Any) -> Any:
    return module(choose(op, torch.device(kind), dtype))


def _without_autocast(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Autocast stays on inside an op, and would turn the fp32 products of a backend into bf16 ones."""

    def run(*args: Any) -> Any:
        with torch.autocast(kind, enabled=False):
            return function(*args)

    return run


def choose(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that runs `op`. fp64 is the specification's dtype and always runs the reference."""
    if dtype == torch.float64:
        return "reference"
    forced = os.environ.get("ASYNCOPD_BACKEND")
    if forced:
        return _forced(forced, op, device)
    for name in _AUTOMATIC:
        if _DEVICE[name] != device.type:
            continue
        # Asked for before the op: without its packages, a backend has none.
        if reason := unavailable_reason(name):
            _warn_once(name, reason)
        elif has_op(name, op):
            return name
    return "reference"


@cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"asyncopd: backend {name!r} cannot run ({reason}); the reference runs instead", stacklevel=6)


def _forced(name: str, op: str, device: torch.device) -> str:
    if name not in _MODULES:
        raise ValueError(f"ASYNCOPD_BACKEND: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if reason := unavailable_reason(name):
        raise BackendUnavailable(f"ASYNCOPD_BACKEND={name} cannot run: {reason}")
    if not has_op(name, op):
        raise BackendUnavailable(f"ASYNCOPD_BACKEND={name} cannot run: it has no {op!r} in this version")
    if name in _DEVICE and _DEVICE[name] != device.type:
        raise BackendUnavailable(f"ASYNCOPD_BACKEND={name} cannot run {op!r} on {device.type} tensors")
    return name
