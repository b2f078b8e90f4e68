"""What every launcher shares: the launch itself, checks, scales, padded sizes. Nothing here synchronises."""

import math
import os
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

# Decided when Triton decorates the kernels, so it is read once.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPE = "cpu" if INTERPRET else "cuda"  # of the tensors that kernels take
LARGEST = torch.finfo(torch.float32).max
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Versions of Triton whose compiled kernels are launched directly. Others have not been tested: their own path runs.
DIRECT_VERSIONS = ("3.6", "3.9")
DIRECT = ".".join(triton.__version__.split(".")[:2]) in DIRECT_VERSIONS
INT32_END = 1 << 31
# What a profiler adds its hooks to. They are called by Triton's own path alone.
_ENTER, _EXIT = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook

# Of a compiled kernel: its `run`, function and metadata.
Compiled = tuple[Callable[..., None], Any, Any]
KeyFunction = Callable[..., tuple[Any, ...]]
# By kernel, options and the arguments' types: how the key is made of arguments, the place of a tensor among them, and
# what is compiled for each key.
_forms: dict[tuple[Any, ...], tuple[KeyFunction, int, dict[tuple[Any, ...], Compiled]]] = {}
# Triton unloads a kernel that nothing refers to any more, as after its caches are cleared.
_loaded: list[Any] = []


def launch(kernel: Any, programs: int, *args: Any, num_warps: int, **options: Any) -> Compiled | None:
    """Runs `kernel[(programs,)]` with all of its parameters by position, on the tensors' device and current stream.

    Triton's own path takes 7 to 14 us of Python to find the compiled kernel; this one keeps what it returned, by a key
    that holds whatever Triton compiles a variant for: the types of all arguments, the dtypes of tensors and whether
    their addresses are multiples of 16, of an int whether it is 1, a multiple of 16, and its width, constexpr values,
    options and device. The values of globals are not in the key: they are constexpr and not assigned to after import,
    and Triton's path compares them on the first launch of each key.

    Triton's own path runs in its interpreter, in its untested versions, and while launch hooks are set.
    Returns: what was run, where it may be run directly again.
    """
    if (
        _direct()
        # By identity: a kernel's hash is that of its source, and takes a lock.
        and (form := _forms.get((id(kernel), num_warps, *map(type, args), *options.items()))) is not None
    ):
        key_of, tensor_at, compiled = form
        active = driver.active
        device, home = active.get_current_device(), args[tensor_at].get_device()
        if home != device and home >= 0:
            with torch.cuda.device(home):
                return launch(kernel, programs, *args, num_warps=num_warps, **options)
        found = compiled.get(key_of(device, *args))
        if found is not None:
            run, function, metadata = found
            run(programs, 1, 1, active.get_current_stream(device), function, metadata, None, None, None, *args)
            return found
    return _launch_and_keep(kernel, programs, args, num_warps, options)


def _direct() -> bool:
    hooks = knobs.runtime
    return (
        DIRECT
        and (hooks.launch_enter_hook is _ENTER and not _ENTER.calls)
        and (hooks.launch_exit_hook is _EXIT and not _EXIT.calls)
    )


def _launch_and_keep(
    kernel: Any, programs: int, args: tuple[Any, ...], num_warps: int, options: dict[str, Any]
) -> Compiled | None:
    tensor_at = next(at for at, value in enumerate(args) if isinstance(value, Tensor))
    with on_device(args[tensor_at]):
        result = kernel[(programs,)](*args, num_warps=num_warps, enable_fp_fusion=True, **options)
        # In the interpreter there is none; with asynchronous compilation it is a future.
        if not (DIRECT and isinstance(kernel, JITFunction) and isinstance(result, CompiledKernel)):
            return None
        if len(args) != len(kernel.params):
            raise TypeError(f"{kernel.__name__}: got {len(args)} arguments, expected {len(kernel.params)}")
        form_key = (id(kernel), num_warps, *map(type, args), *options.items())
        form = _forms.get(form_key)
        if form is None:
            form = _forms.setdefault(form_key, (_key_function(kernel, args), tensor_at, {}))
        key = form[0](driver.active.get_current_device(), *args)
        if key not in form[2]:
            _loaded.append(result)
        return form[2].setdefault(key, (result.run, result.function, result.packed_metadata))


def _key_function(kernel: Any, args: tuple[Any, ...]) -> KeyFunction:
    """(device, *args) -> key, for leading arguments of these types: as source, since a loop takes 4 times as long."""
    names = [f"a{at}" for at in range(len(args))]
    pointers, numbers, parts = [], [], ["device"]
    for name, value, param in zip(names, args, kernel.params[: len(args)], strict=True):
        if param.is_constexpr or isinstance(value, bool):
            parts.append(name)
        elif isinstance(value, Tensor):
            parts.append(f"{name}.dtype")
            pointers.append(f"{name}.data_ptr()")
        elif isinstance(value, int):
            if param.do_not_specialize:
                parts.append(f"-{INT32_END} <= {name} < {INT32_END} or wide({name})")
            else:
                # 16 to 31 by the remainder, which is more than Triton asks for; 1 and 0 as they are.
                parts.append(f"{name} & 15 | 16 if {name} > 1 else {name}")
                numbers.append(name)
        elif not (value is None or isinstance(value, float)):  # these two are told by their types
            raise TypeError(f"{kernel.__name__}: got {name} = {value!r}, expected a tensor, a number or None")
    # Nearly always all addresses are multiples of 16, and all ints from 0 to 2^31: one test for all of them.
    if pointers:
        exactly = ", ".join(f"{pointer} & 15 == 0" for pointer in pointers)
        parts.append(f"({' | '.join(pointers)}) & 15 and ({exactly},)")
    if numbers:
        exactly = ", ".join(f"wide({name})" for name in numbers)
        parts.append(f"({' | '.join(numbers)}) >> 31 and ({exactly},)")
    # `kernel` as a default lives as long as the function, so that its id is not used again.
    source = f"def key(device, {', '.join(names)}, kernel=kernel):\n    return ({', '.join(parts)},)"
    namespace: dict[str, Any] = {"wide": _wide, "kernel": kernel}
    exec(source, namespace)
    key: KeyFunction = namespace["key"]
    return key


def _wide(value: int) -> tuple[int, bool, bool, bool]:
    """The class of an int that is negative or takes more than 32 bits."""
    return value & 15, value >= -INT32_END, value >= INT32_END, value >= 1 << 63


class Prepared:
    """`launch` of a kernel whose arguments but the first few are known; whoever makes it keeps it by their values.

    What is given at the call are tensors, the first of all arguments, and ints that Triton does not specialise. Their
    dtypes and addresses are the key then: 2 us less than by `launch`, which looks at all arguments.
    """

    __slots__ = ("_compiled", "_kernel", "_key_of", "_num_warps", "_options", "_rest")

    def __init__(self, kernel: Any, *rest: Any, num_warps: int, **options: Any) -> None:
        self._kernel, self._rest, self._num_warps, self._options = kernel, rest, num_warps, options
        self._compiled: dict[tuple[Any, ...], Compiled] = {}
        self._key_of: KeyFunction | None = None

    def __call__(self, programs: int, *args: Any) -> None:
        key = None
        if self._key_of is not None and _direct():
            active = driver.active
            device, home = active.get_current_device(), args[0].get_device()
            if home != device and home >= 0:
                with torch.cuda.device(home):
                    return self(programs, *args)
            key = self._key_of(device, *args)
            found = self._compiled.get(key)
            if found is not None:
                run, function, metadata = found
                stream = active.get_current_stream(device)
                run(programs, 1, 1, stream, function, metadata, None, None, None, *args, *self._rest)
                return None
        found = launch(self._kernel, programs, *args, *self._rest, num_warps=self._num_warps, **self._options)
        if found is not None:
            if key is not None:
                self._compiled[key] = found
            elif self._key_of is None:
                self._key_of = _key_function(self._kernel, args)
        return None


class Scale(NamedTuple):
    """1 / temperature and log2(e) / temperature, each as the sum of two floats, in the order that kernels take them."""

    t: float
    t_low: float
    scale: float
    scale_low: float

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, temperature: float) -> "Scale":
        return cls(*float_pair(1.0 / temperature), *float_pair(math.log2(math.e) / temperature))


def float_pair(value: float) -> tuple[float, float]:
    """An fp64 number as the sum of two fp32 ones; the largest finite one of its sign where it is too large."""
    high = _as_fp32(max(-LARGEST, min(value, LARGEST)))
    return high, _as_fp32(value - high) if abs(value) < LARGEST else 0.0


def _as_fp32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def check_logits(logits: Tensor) -> Tensor:
    """Logits [N, V] with unit stride inside a row, or an error where kernels cannot read them.

    Shapes, ids and temperature have been checked by the op: once is enough.
    """
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits: got {logits.dtype}, expected float32, bfloat16 or float16")
    if not (logits.is_cuda if DEVICE_TYPE == "cuda" else logits.is_cpu):
        raise ValueError(f"logits: got device {logits.device}, expected {DEVICE_TYPE}")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def check_ids(ids: Tensor, logits: Tensor) -> Tensor:
    """Contiguous ids [N, K] beside logits [N, V]."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: got {ids.dtype}, expected int32 or int64")
    if ids.dim() != 2 or ids.shape[0] != logits.shape[0]:
        raise ValueError(f"ids: got shape {list(ids.shape)}, expected [{logits.shape[0]}, K] as logits has rows")
    if ids.device != logits.device:
        raise ValueError(f"ids: got device {ids.device}, expected {logits.device} as logits")
    return ids.contiguous()


def on_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device and its current stream: entered only if that is another one."""
    home = tensor.get_device()
    return nullcontext() if home < 0 or home == torch.cuda.current_device() else torch.cuda.device(home)


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up. Triton's own is made for kernels and takes ten times as long."""
    return -(-n // by)


def padded(n: int, least: int) -> int:
    """The power of two that a block of n needs."""
    return max(least, 1 << max(0, n - 1).bit_length())


def warps_for(elements: int, per_thread: int) -> int:
    """Warps such that a thread holds about `per_thread` of a block's elements, within what an SM allows."""
    return min(32, padded(cdiv(elements, 32 * per_thread), 4))
