"""Which backends and extras work on this machine, and why not."""

import importlib.metadata
import importlib.util
import os
import platform
import warnings

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from asyncopd import __version__, backends
from asyncopd.backends import reference
from asyncopd.pipeline.shared import available_memory

_OPS = reference.__all__
_PACKAGES = ("torch", "transformers", "triton", "vllm", "liger-kernel", "numpy", "safetensors", "pydantic")


def report() -> Group:
    machine = Table("machine", "", title=f"asyncopd {__version__}")
    machine.add_row("platform", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    machine.add_row("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores, {_cpu_capability()}")
    machine.add_row("CUDA", _cuda())
    machine.add_row("CUDA tensors run on", escape(_on_a_gpu()))
    machine.add_row("pipeline", _pipeline())
    forced = os.environ.get("ASYNCOPD_BACKEND")
    machine.add_row("ASYNCOPD_BACKEND", forced or "not set: chosen by device and dtype")

    rows = Table("backend", "works here", "ops")
    for name in backends.BACKENDS:
        reason = backends.unavailable_reason(name)
        ops = [op for op in _OPS if backends.has_op(name, op)]
        works = "yes" if reason is None else escape(f"no: {reason}")
        rows.add_row(name, works, "all" if ops == _OPS else ", ".join(ops) or "none")

    on_gpu = torch.cuda.is_available()
    chosen = Table("op", "CPU tensors (fp32) run on", *(["CUDA tensors (bf16) run on"] if on_gpu else []))
    for op in _OPS:
        row = [_chosen(op, torch.device("cpu"), torch.float32)]
        chosen.add_row(op, *row, *([_chosen(op, torch.device("cuda"), torch.bfloat16)] if on_gpu else []))

    packages = Table("package", "version")
    for name in _PACKAGES:
        packages.add_row(name, _version(name))
    return Group(machine, rows, chosen, packages)


def _chosen(op: str, device: torch.device, dtype: torch.dtype) -> str:
    try:
        with warnings.catch_warnings():  # why a backend cannot run is in the other tables
            warnings.simplefilter("ignore")
            return backends.choose(op, device, dtype)
    except (backends.BackendUnavailable, ValueError) as error:
        return escape(f"error: {error}")


def _on_a_gpu() -> str:
    """What a GPU has without being told; also where there is none, so that a missing package is found out early."""
    if importlib.util.find_spec("triton") is None:
        return "reference, slowly: triton is not installed (pip install 'asyncopd[triton]')"
    if torch.cuda.is_available() and (reason := backends.unavailable_reason("triton")):
        return f"reference, slowly: {reason}"
    return "see the ops below" if torch.cuda.is_available() else "triton, on a machine with a GPU"


def _cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device" if torch.version.cuda else "torch was built without CUDA"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _pipeline() -> str:
    if not hasattr(os, "memfd_create"):
        return "not here: its shared memory (memfd_create) needs Linux"
    return f"{available_memory() / 2**30:.1f} GiB of memory available for slots and weights"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
