"""Slots: groups of finished sequences in shared memory, packed without padding.

One slot holds up to S sequences, one after the other. With T_i the tokens (prompt + response) and
R_i the response tokens of sequence i, and K entries in a support:

    tokens            int32   [sum T_i]      each prompt, then its response
    prompt_lengths    int32   [n]
    response_lengths  int32   [n]
    uids              int64   [n]
    versions          int32   [sum R_i]      policy version that wrote each response token
    ids               int32   [sum R_i, K]   support; -1 where nothing is set
    log_weights       float32 [sum R_i, K]   -inf where nothing is set
    teacher_logprobs  float32 [sum R_i, K]   -inf until the teacher has scored the slot

Memory is reserved for the longest possible group and touched only as far as real tokens go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.pipeline.protocols import Rollout
from asyncopd.pipeline.shared import TensorSpec, align, carve, layout_bytes


@dataclass(slots=True, frozen=True)
class SlotSpec:
    """Sizes of a slot arena.

    Args:
        num_slots: slots in the arena.
        max_sequences: most sequences in one slot (S).
        max_tokens: most prompt + response tokens in one slot.
        max_response_tokens: most response tokens in one slot.
        num_scores: entries in the support of one response token (K).

    Raises:
        ValueError: a size below 1.
    """

    num_slots: int
    max_sequences: int
    max_tokens: int
    max_response_tokens: int
    num_scores: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"SlotSpec.{name} must be at least 1, got {getattr(self, name)}")

    def tensors(self) -> list[TensorSpec]:
        """The tensors of one slot in their order in memory."""
        rows, scores = self.max_response_tokens, (self.max_response_tokens, self.num_scores)
        return [
            TensorSpec("counts", (3,), torch.int32),  # sequences, tokens, response tokens
            TensorSpec("tokens", (self.max_tokens,), torch.int32),
            TensorSpec("prompt_lengths", (self.max_sequences,), torch.int32),
            TensorSpec("response_lengths", (self.max_sequences,), torch.int32),
            TensorSpec("uids", (self.max_sequences,), torch.int64),
            TensorSpec("versions", (rows,), torch.int32),
            TensorSpec("ids", scores, torch.int32),
            TensorSpec("log_weights", scores, torch.float32),
            TensorSpec("teacher_logprobs", scores, torch.float32),
        ]

    @property
    def slot_bytes(self) -> int:
        return align(layout_bytes(self.tensors()))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arena."""
        return self.num_slots * self.slot_bytes

    @property
    def bytes_per_response_token(self) -> int:
        """What travels per response token: its id and version, and K (id, log w, log q)."""
        return 4 + 4 + 12 * self.num_scores


@dataclass(slots=True, frozen=True)
class Span:
    """Where one sequence lies in its slot.

    ``tokens[start : start + prompt_length + response_length]`` are its tokens and
    ``[row : row + response_length]`` its rows of versions, ids, log_weights and teacher_logprobs.
    """

    start: int
    prompt_length: int
    response_length: int
    row: int


class SlotView:
    """One slot: zero-copy tensors cut to what is really in it, and appending.

    Two processes never use a slot at the same time: the supervisor passes it on like a baton.
    """

    __slots__ = ("_full", "index", "spec")

    def __init__(self, arena: Tensor, spec: SlotSpec, index: int) -> None:
        self.index = index
        self.spec = spec
        self._full = carve(arena, index * spec.slot_bytes, spec.tensors())

    @property
    def num_sequences(self) -> int:
        return int(self._full["counts"][0])

    @property
    def num_tokens(self) -> int:
        return int(self._full["counts"][1])

    @property
    def num_response_tokens(self) -> int:
        return int(self._full["counts"][2])

    @property
    def tokens(self) -> Tensor:
        return self._full["tokens"][: self.num_tokens]

    @property
    def prompt_lengths(self) -> Tensor:
        return self._full["prompt_lengths"][: self.num_sequences]

    @property
    def response_lengths(self) -> Tensor:
        return self._full["response_lengths"][: self.num_sequences]

    @property
    def uids(self) -> Tensor:
        return self._full["uids"][: self.num_sequences]

    @property
    def versions(self) -> Tensor:
        return self._full["versions"][: self.num_response_tokens]

    @property
    def ids(self) -> Tensor:
        return self._full["ids"][: self.num_response_tokens]

    @property
    def log_weights(self) -> Tensor:
        return self._full["log_weights"][: self.num_response_tokens]

    @property
    def teacher_logprobs(self) -> Tensor:
        return self._full["teacher_logprobs"][: self.num_response_tokens]

    def spans(self) -> list[Span]:
        """Where each sequence lies, in order."""
        spans, start, row = [], 0, 0
        pairs = zip(self.prompt_lengths.tolist(), self.response_lengths.tolist(), strict=True)
        for prompt, response in pairs:
            spans.append(Span(start, prompt, response, row))
            start += prompt + response
            row += response
        return spans

    def clear(self) -> None:
        """Empty the slot."""
        self._full["counts"].zero_()

    def append(self, rollout: Rollout) -> bool:
        """Add one sequence; False, and nothing changed, when it does not fit any more.

        Raises:
            ValueError: an empty response, lengths or shapes that disagree, or a sequence that
                would not fit an empty slot either.
        """
        count, start, row = (int(value) for value in self._full["counts"])
        prompt, response = len(rollout.prompt_ids), rollout.response_ids.numel()
        self._check(rollout, prompt, response)
        end, last = start + prompt + response, row + response
        spec = self.spec
        if count == spec.max_sequences or end > spec.max_tokens or last > spec.max_response_tokens:
            return False
        full = self._full
        full["tokens"][start : start + prompt] = torch.tensor(rollout.prompt_ids, dtype=torch.int32)
        full["tokens"][start + prompt : end] = rollout.response_ids
        full["prompt_lengths"][count] = prompt
        full["response_lengths"][count] = response
        full["uids"][count] = rollout.uid
        full["versions"][row:last] = rollout.versions
        full["ids"][row:last] = -1 if rollout.ids is None else rollout.ids
        full["log_weights"][row:last] = -torch.inf if rollout.log_weights is None else rollout.log_weights
        full["teacher_logprobs"][row:last] = -torch.inf
        full["counts"][:] = torch.tensor([count + 1, end, last], dtype=torch.int32)
        return True

    def _check(self, rollout: Rollout, prompt: int, response: int) -> None:
        spec = self.spec
        if response == 0:
            raise ValueError(f"sequence {rollout.uid}: the response is empty")
        if prompt + response > spec.max_tokens or response > spec.max_response_tokens:
            raise ValueError(
                f"sequence {rollout.uid}: {prompt} prompt and {response} response tokens exceed a "
                f"whole slot ({spec.max_tokens} tokens, {spec.max_response_tokens} of responses)"
            )
        shape = (response, spec.num_scores)
        for name, value, expected in (
            ("versions", rollout.versions, (response,)),
            ("ids", rollout.ids, shape),
            ("log_weights", rollout.log_weights, shape),
        ):
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(f"sequence {rollout.uid}: {name} has shape {tuple(value.shape)}, expected {expected}")


class SlotArena:
    """All slots over one piece of shared memory.

    Args:
        spec: the sizes.
        memory: uint8 [spec.nbytes]; a fresh private one when left out.
    """

    def __init__(self, spec: SlotSpec, memory: Tensor | None = None) -> None:
        self.spec = spec
        self._memory = torch.zeros(spec.nbytes, dtype=torch.uint8) if memory is None else memory
        if self._memory.numel() < spec.nbytes:
            raise ValueError(f"memory has {self._memory.numel()} bytes, the arena needs {spec.nbytes}")

    def slot(self, index: int) -> SlotView:
        """Slot ``index``; raises IndexError outside [0, num_slots)."""
        if not 0 <= index < self.spec.num_slots:
            raise IndexError(f"slot {index} of {self.spec.num_slots}")
        return SlotView(self._memory, self.spec, index)
