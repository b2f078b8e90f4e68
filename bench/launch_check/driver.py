"""A stand-in for the CUDA driver: Triton's own launch path on CPU tensors, with no GPU.

Kernels are specialised, compiled for sm_90 and given to a launcher as on a device; the launcher records the launch and
runs nothing. So whatever fails before a kernel runs fails here too: argument types, specialisation, Triton's check of
globals, the compiler, limits of a block. What kernels would write stays as it was.
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

import asyncopd.kernels
from asyncopd import backends

ARCH = 90
MAX_SHARED_BYTES = 227 * 1024
# No machine has a device of this number: what is compiled here is never launched on one.
DEVICE = 1 << 20
# These read data where tensors are on the CPU, to refuse it; on a device they read nothing, so here neither.
_CHECKS_OF_DATA = ("check_ids_in_range", "check_possible", "check_weights")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as a launch made it: `types` and `constants` by argument, paths of what the compiler left."""

    function: JITFunction[Any]
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    shared_bytes: int
    ptx: Path
    cubin: Path

    @property
    def name(self) -> str:
        return str(self.function.__name__)

    @property
    def variant(self) -> str:
        """Types and constants, as one line."""
        arguments = (f"{name}={self.constants.get(name, kind)}" for name, kind in self.types.items())
        return f"{self.name}({', '.join(arguments)}, num_warps={self.num_warps})"


@dataclass(frozen=True, slots=True)
class Launch:
    """Which compiled kernel was launched, and what the launcher was given."""

    function: JITFunction[Any]
    binary: str  # a hash of the source, of what it was specialised on, and of the options
    grid: tuple[int, int, int]
    types: tuple[str, ...]
    handle: int
    packed_metadata: Any
    hooks: tuple[Any, Any]
    arguments: tuple[Any, ...]


@dataclass(slots=True)
class Recorder:
    """What was compiled and launched."""

    compiled: list[Compiled] = field(default_factory=list)
    launched: dict[JITFunction[Any], int] = field(default_factory=dict)
    launches: list[Launch] | None = None  # kept if a list

    @property
    def count(self) -> int:
        return sum(self.launched.values())


_recorder = Recorder()


class _Launcher:
    """In the place of triton.backends.nvidia.driver.CudaLauncher."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.function = source.fn
        self.types = tuple(source.signature.values())
        self.binary = metadata.hash

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: int,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *arguments: Any,
    ) -> None:
        # As the real one does, in C.
        for argument in arguments:
            if isinstance(argument, Tensor):
                argument.data_ptr()
        _recorder.launched[self.function] = _recorder.launched.get(self.function, 0) + 1
        if _recorder.launches is not None:
            launch = Launch(
                self.function,
                self.binary,
                (grid_x, grid_y, grid_z),
                self.types,
                function,
                packed_metadata,
                (enter_hook, exit_hook),
                arguments,
            )
            _recorder.launches.append(launch)


class _Utils:
    """In the place of triton.backends.nvidia.driver.CudaUtils."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        """No module, which would be unloaded when there is no driver any more; a handle of the function, registers and
        spills, which nobody here reads, and the threads of a block."""
        return None, 2, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED_BYTES, "multiprocessor_count": 132}


class _Driver:
    """In the place of triton.backends.nvidia.driver.CudaDriver."""

    launcher_cls = _Launcher
    utils = _Utils()
    binary_ext = "cubin"

    def get_current_device(self) -> int:
        return DEVICE

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(ARCH, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def stand_in(*, clear_memory: bool = False, keep_launches: bool = False) -> Iterator[Recorder]:
    """CPU tensors run the `triton` backend, whose launches are recorded and go nowhere.

    clear_memory: memory that torch leaves uninitialised is 0, so that ids which no kernel has written are valid ones.
    Raises: RuntimeError if Triton interprets its kernels here.
    """
    global _recorder
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: is set, expected kernels that are compiled")
    modules = [*_package("asyncopd.kernels"), *_loaded("asyncopd")]
    recorder = Recorder(launches=[] if keep_launches else None)

    def listener(*, src: Any, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        recorder.compiled.append(_compiled(src, metadata, metadata_group))

    with ExitStack() as stack:
        set_to = lambda owner, name, value: stack.enter_context(mock.patch.object(owner, name, value))  # noqa: E731
        for name in _CHECKS_OF_DATA:
            _replace(set_to, modules, name, lambda *args, **kwargs: None)
        _replace(set_to, modules, "DEVICE_TYPE", "cpu")
        set_to(asyncopd.kernels, "unavailable_reason", lambda: None)
        stack.enter_context(mock.patch.dict(backends._DEVICE, triton="cpu"))
        stack.enter_context(mock.patch.dict("os.environ", ASYNCOPD_BACKEND="triton"))
        set_to(knobs.compilation, "listener", listener)
        if clear_memory:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
                set_to(owner, name, _zeroed(getattr(owner, name)))
        set_to(sys.modules[__name__], "_recorder", recorder)
        # Not by reset_active() afterwards: that looks for a driver, and here there may be none.
        set_to(triton.runtime.driver, "_active", _Driver())
        _forget_choices()
        stack.callback(_forget_choices)
        yield recorder


def _compiled(source: Any, metadata: dict[str, Any], files: dict[str, str]) -> Compiled:
    names = source.fn.arg_names
    paths = {Path(name).suffix: Path(path) for name, path in files.items()}
    return Compiled(
        function=source.fn,
        types=dict(source.signature),
        constants={names[index[0]]: value for index, value in source.constants.items()},
        num_warps=metadata["num_warps"],
        shared_bytes=metadata["shared"],
        ptx=paths[".ptx"],
        cubin=paths[".cubin"],
    )


def _forget_choices() -> None:
    """Backends that were chosen, and reasons why one cannot run, are cached."""
    for function in vars(backends).values():
        if hasattr(function, "cache_clear") and function is not backends.module:
            function.cache_clear()


def _package(name: str) -> list[ModuleType]:
    package = importlib.import_module(name)
    return [importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, f"{name}.")]


def _loaded(prefix: str) -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name == prefix or name.startswith(f"{prefix}.")]


def _replace(set_to: Any, modules: list[ModuleType], name: str, value: Any) -> None:
    """In every module that has the name; there has to be one, or the stand-in no longer fits the package."""
    owners = {id(module): module for module in modules if hasattr(module, name)}
    if not owners:
        raise RuntimeError(f"no module of asyncopd has {name!r}, which the stand-in driver replaces")
    for owner in owners.values():
        set_to(owner, name, value)


def _zeroed(function: Any) -> Any:
    def zeroed(*args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = function(*args, **kwargs)
        return out.zero_() if out.device.type == "cpu" else out

    return zeroed
