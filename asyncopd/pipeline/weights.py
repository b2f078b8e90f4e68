"""Weights in shared memory: two buffers, so that one can be read while the other is written.

The hazard rule: buffer b may be overwritten only when every rollout worker is done with the version
in it. `WeightBuffers` is that rule and nothing else; `WeightSegment` is the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from asyncopd.pipeline.shared import TensorSpec, carve, layout_bytes

NUM_BUFFERS = 2


def specs_of(named: Mapping[str, Tensor]) -> list[TensorSpec]:
    """The spec of a state dict."""
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in named.items()]


def segment_bytes(specs: Sequence[TensorSpec]) -> int:
    """Bytes of both buffers."""
    return NUM_BUFFERS * layout_bytes(specs)


class WeightSegment:
    """Both buffers over one piece of shared memory.

    Args:
        specs: the tensors of one version.
        memory: uint8 [segment_bytes(specs)]; a fresh private one when left out.
    """

    def __init__(self, specs: Sequence[TensorSpec], memory: Tensor | None = None) -> None:
        if memory is None:
            memory = torch.zeros(segment_bytes(specs), dtype=torch.uint8)
        size = layout_bytes(specs)
        self._buffers = [carve(memory, b * size, specs) for b in range(NUM_BUFFERS)]

    def write(self, buffer: int, named: Mapping[str, Tensor]) -> None:
        """Copy one version in; a tensor of another dtype is converted.

        Raises:
            ValueError: names or a shape that differ from the spec.
        """
        views = self._buffers[buffer]
        if odd := views.keys() ^ named.keys():
            raise ValueError(f"weights and weight_spec() disagree on {sorted(odd)}")
        for name, view in views.items():
            tensor = named[name].detach()
            if tensor.shape != view.shape:
                raise ValueError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, weight_spec() said {tuple(view.shape)}"
                )
            view.copy_(tensor)

    def read(self, buffer: int) -> dict[str, Tensor]:
        """Views of one version, no copy; valid until the reader says that it is done."""
        return dict(self._buffers[buffer])


class WeightBuffers:
    """Which buffer may be written, and which version the rollout workers were told of."""

    def __init__(self, workers: int) -> None:
        self._workers = range(workers)
        self._version = [-1] * NUM_BUFFERS
        self._reading: list[set[int]] = [set() for _ in range(NUM_BUFFERS)]
        self._writing: set[int] = set()

    @property
    def version(self) -> int:
        """The newest published version; -1 before the first."""
        return max(self._version)

    def free(self) -> int | None:
        """The buffer to write next: the oldest that nobody reads or writes; None if none."""
        free = [b for b in range(NUM_BUFFERS) if not self._reading[b] and b not in self._writing]
        return min(free, key=self._version.__getitem__, default=None)

    def writing(self, buffer: int) -> None:
        """The learner was told to write the buffer."""
        self._writing.add(buffer)

    @property
    def being_written(self) -> bool:
        """Whether a publication is on its way."""
        return bool(self._writing)

    def published(self, buffer: int, version: int) -> None:
        """The learner wrote ``version``; from now on every rollout worker may read the buffer."""
        self._writing.discard(buffer)
        self._version[buffer] = version
        self._reading[buffer] = set(self._workers)

    def acknowledged(self, worker: int, version: int) -> None:
        """``worker`` is done with ``version`` and with every older one."""
        for buffer, held in enumerate(self._version):
            if held <= version:
                self._reading[buffer].discard(worker)

    def owed_by(self, worker: int) -> bool:
        """Whether ``worker`` was told of a version and has not said that it is done with it."""
        return any(worker in reading for reading in self._reading)
