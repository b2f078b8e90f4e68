"""Shared memory without a name, and typed tensors carved out of it.

The memory is a ``memfd``: a file that exists only as a descriptor. There is no entry in /dev/shm to
leave behind however a process dies, and the small /dev/shm of a container does not limit it. The
descriptor goes to a worker once, when it is spawned; the size may be set later by the parent, so
workers can start in parallel with the learner that knows how large its weights are.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; a cache line, and more than any vector load needs


@dataclass(slots=True, frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def align(nbytes: int) -> int:
    """Round up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def layout_bytes(specs: Sequence[TensorSpec]) -> int:
    """Bytes that the tensors take one after the other, each starting on a multiple of ALIGNMENT."""
    return sum(align(spec.nbytes) for spec in specs)


def carve(arena: Tensor, start: int, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Views of the tensors in ``arena`` (uint8, 1-d) from byte ``start``, in order, no copy."""
    views: dict[str, Tensor] = {}
    for spec in specs:
        raw = arena[start : start + spec.nbytes]
        views[spec.name] = raw.view(spec.dtype).view(spec.shape)
        start += align(spec.nbytes)
    return views


def available_memory() -> int:
    """Bytes that can still be had: of the machine, or of the control group if that is less."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):  # counts reclaimable cache, which AVPHYS does not
            pages = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        # The kernel drops the file cache that nobody uses before it lets the group run out.
        counts = dict(line.split(maxsplit=1) for line in _read("/sys/fs/cgroup/memory.stat").splitlines())
        pages = min(pages, int(limit) - int(used) + int(counts.get("inactive_file", 0)))
    return max(pages, 0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


class SharedBytes:
    """A piece of anonymous shared memory; pickles only as an argument of a process being spawned.

    Raises:
        RuntimeError: the platform has no ``memfd_create`` (it needs Linux).
    """

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise RuntimeError(
                "the pipeline keeps its slots in anonymous shared memory (memfd_create), which "
                "only Linux has; run it there, or in a Linux container"
            )
        self._fd = os.memfd_create("asyncopd", os.MFD_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._fd)  # for those who never call close()

    def resize(self, nbytes: int, *, holds: str, lower: str, reserved: int = 0) -> None:
        """Set the size in bytes, once, before anybody maps it.

        Args:
            nbytes: the size.
            holds, lower: for the message: what is in it, and which settings make it smaller.
            reserved: bytes of shared memory that others were promised. Pages are taken only when they
                are written to, so the machine still counts those as available.

        Raises:
            MemoryError: more than the machine has left; names ``holds`` and what to ``lower``.
        """
        free = max(available_memory() - reserved, 0)
        if nbytes > free:
            besides = f" besides {reserved / 2**20:,.0f} MiB that are reserved already" if reserved else ""
            raise MemoryError(
                f"{holds} would need {nbytes / 2**20:,.0f} MiB of shared memory, and "
                f"{free / 2**20:,.0f} MiB are available{besides}; lower {lower}"
            )
        os.ftruncate(self._fd, nbytes)

    def tensor(self) -> Tensor:
        """Map all of it: uint8 [size]. The mapping lives as long as a tensor over it."""
        size = os.fstat(self._fd).st_size
        return torch.frombuffer(mmap.mmap(self._fd, size), dtype=torch.uint8)

    def close(self) -> None:
        """Close the descriptor; tensors mapped before stay valid."""
        self._close()  # once only
        self._fd = -1

    def __getstate__(self) -> Any:
        return DupFd(self._fd)

    def __setstate__(self, descriptor: Any) -> None:
        self._fd = descriptor.detach()
        self._close = weakref.finalize(self, os.close, self._fd)
