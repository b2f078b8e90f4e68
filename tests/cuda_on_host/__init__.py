"""csrc/cuda/*.cu compiled by the host's C++ compiler and run on its CPU, so that CUDA kernels are tested without a GPU.

cuda_runtime.h and its siblings hold as much of CUDA C++ as the kernels need. machine.cpp runs a grid block by block.
Every thread of a block is a fibre; it runs until it comes to a collective (__syncthreads, __shfl_sync, ...) and goes on
when all whom the collective names have come to it. So that errors show:

- A collective that somebody misses, or comes to on another line, is an error with both lines, not a hang.
- Between collectives, threads run one after another: forward, backward or in a random order, warps far ahead of each
  other. What needs a barrier that is not there differs between schedules; every test runs under several.
- Shared memory is 0xff (NaN, -1) before each block, and none beyond what the launch asked for may be written.
- A 16-byte load that is not aligned is an error.

Not modelled: time, the memory model within a warp that runs in step, rounding of the special function units.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asyncopd.backends.native import DTYPE_CODES, ID_TYPE_CODES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_host"

FORWARD, BACKWARD, RANDOM = 0, -1, 7
SCHEDULES = (FORWARD, BACKWARD, RANDOM)


@cache
def compiler() -> list[str] | None:
    """As setup.py chooses it, or None where there is none."""
    named = os.environ.get("CXX", "").split()
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return named or ([found] if found else None)


NEEDED = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (CXX, c++, g++, clang++) to compile csrc/cuda with"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the fibres need Linux"),
    pytest.mark.skipif(os.environ.get("ASYNCOPD_SANITIZE") == "1", reason="fibres confuse the sanitizers"),
]


class Library:
    """CUDA sources that became a shared library; launches take CPU tensors."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.cuda_on_host_message.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: object, schedule: int = FORWARD, returns: type = ctypes.c_int) -> int:
        """What the function returned; an AssertionError with the machine's message where a kernel failed."""
        self._library.cuda_on_host_schedule(schedule)
        function = getattr(self._library, name)
        function.restype = returns
        status = int(function(*map(_as_c, arguments)))
        message = self._library.cuda_on_host_message().decode()
        assert not message, message
        return status


def _as_c(value: object) -> object:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    assert isinstance(value, int)
    return ctypes.c_int64(value)


def build(sources: Sequence[Path], folder: Path = CACHE) -> Path:
    """The shared library of these sources. Nothing is compiled twice for the same content, headers included."""
    # Some distributions' compilers define _FORTIFY_SOURCE: glibc's longjmp then aborts where it leads to another stack,
    # as it does between fibres. No contraction: a device's compiler fuses other products than the host's would.
    options = ["-U_FORTIFY_SOURCE", "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", f"-I{HERE}"]
    headers = [*sorted(HERE.glob("*.h")), CSRC / "cpu" / "codes.h"]
    machine = HERE / "machine.cpp"
    objects = [_output(machine, [*options, "-c", "-x", "c++", machine], headers, CACHE)]
    for source in sources:
        beside = [path for pattern in ("*.h", "*.cuh") for path in sorted(source.parent.glob(pattern))]
        objects.append(_output(source, [*options, "-c", "-x", "c++", source], [*headers, *beside], folder))
    return _output(sources[0], ["-shared", *objects], objects, folder)


def _output(source: Path, arguments: Sequence[str | Path], depends: Sequence[Path], folder: Path) -> Path:
    """What the compiler makes of these arguments, named after the content of all that goes in."""
    cxx = compiler()
    assert cxx is not None
    digest = hashlib.sha256(" ".join(map(str, [*cxx, *arguments])).encode())
    for path in (source, *depends):
        digest.update(path.read_bytes())
    output = folder / f"{source.stem}-{digest.hexdigest()[:16]}"
    if output.exists():
        return output
    folder.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(f".{os.getpid()}.partial")
    done = subprocess.run([*cxx, *arguments, "-o", partial], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    partial.replace(output)
    return output


@cache
def library(*sources: Path) -> Library:
    return Library(build(sources))


def kernels() -> Library:
    return library(*sorted((CSRC / "cuda").glob("*.cu")))


def gather_logprobs(
    logits: Tensor, ids: Tensor, temperature: float, *, schedule: int = FORWARD, library: Library | None = None
) -> tuple[Tensor, Tensor]:
    """As the function of the cuda backend, on CPU tensors; `logits` with unit column stride."""
    (rows, vocab), num_ids = logits.shape, ids.shape[1]
    logprobs, lse = torch.full((rows, num_ids), 9e9), torch.full((rows,), 9e9)
    status = (library or kernels()).call(
        "asyncopd_cuda_gather_logprobs",
        *(logits, DTYPE_CODES[logits.dtype], logits.stride(0), ids, ID_TYPE_CODES[ids.dtype], rows, vocab, num_ids),
        *(1.0 / temperature, logprobs, lse, 0, None),
        schedule=schedule,
    )
    assert status == 0
    return logprobs, lse


def meetings() -> int:
    """Collectives that the threads of the last launch came to: a measure of what a kernel does beside streaming."""
    return kernels().call("cuda_on_host_meetings", returns=ctypes.c_int64)


def topk_size(what: str, *arguments: int) -> int:
    """asyncopd_cuda_topk_parts or _scratch_bytes."""
    return kernels().call(f"asyncopd_cuda_topk_{what}", *arguments, returns=ctypes.c_int64)


def topk_logprobs(
    logits: Tensor,
    k: int,
    temperature: float,
    *,
    parts: int = 1,
    schedule: int = FORWARD,
    library: Library | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the function of the cuda backend, but in a given number of parts."""
    library = library or kernels()
    rows, vocab = logits.shape
    code = DTYPE_CODES[logits.dtype]
    ids = torch.full((rows, k), -9)
    logprobs, lse = torch.full((rows, k), 9e9), torch.full((rows,), 9e9)
    size = topk_size("scratch_bytes", code, rows, vocab, k, parts)
    guard = 64
    scratch = torch.full((size + guard,), 0xFF, dtype=torch.uint8)
    status = library.call(
        "asyncopd_cuda_topk_logprobs",
        *(logits, code, logits.stride(0), rows, vocab, k, 1.0 / temperature, parts, scratch, ids, logprobs, lse),
        *(0, None),
        schedule=schedule,
    )
    assert status == 0
    assert (scratch[size:] == 0xFF).all(), "wrote beyond the scratch"
    return ids, logprobs, lse
