"""Engines without a model: every number they write can be checked by whoever reads it."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asyncopd.pipeline import (
    PipelineConfig,
    Rollout,
    RolloutRequest,
    SlotView,
    TensorSpec,
    specs_of,
)

PLACES = 6


@dataclass(slots=True)
class Fake:
    """How the fake engines behave. ``faults`` maps a worker's name to what it does wrong."""

    num_scores: int = 3
    longest: int = 9
    decode_s: float = 0.0005
    score_s: float = 0.001
    step_s: float = 0.002
    load_s: float = 0.0
    slow_worker: str = ""  # its decode step takes slow_s
    slow_s: float = 0.0
    faults: dict[str, str] | None = None  # raise, exit, kill, hang, endless, start, slow start
    fault_after: int = 3  # calls that go well
    log: str = ""  # the learner notes here what it consumes
    mark: str = ""  # a file touched right before going wrong
    save_s: float = 0.0
    tensors: bool = False  # the learner's metrics are tensors
    bare: bool = False  # the learner has no weights

    def sleep(self, seconds: float) -> None:
        time.sleep(self.slow_s if current_process().name == self.slow_worker else seconds)


class Fault:
    """Goes wrong in the way and at the call that the Fake says."""

    def __init__(self, fake: Fake) -> None:
        self.kind = (fake.faults or {}).get(current_process().name, "")
        self.left = fake.fault_after
        self.mark = fake.mark
        if self.kind == "start":
            raise OSError("no such model")
        if self.kind == "slow start":
            time.sleep(3600)

    def __call__(self) -> None:
        self.left -= 1
        if self.left >= 0 or not self.kind:
            return
        if self.mark:
            Path(self.mark).touch()
        if self.kind == "raise":
            raise ArithmeticError("the numbers went bad")
        if self.kind == "exit":
            os._exit(7)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "hang":
            time.sleep(3600)


def memfds(pid: int | str = "self") -> set[int]:
    """The inodes of the pipeline's shared memory that a process has open."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if "memfd:asyncopd" in os.readlink(entry):
                found.add(entry.stat().st_ino)
    return found


def prompt_of(uid: int) -> list[int]:
    return [uid, *range(uid % 4)]


def length_of(uid: int, longest: int) -> int:
    return 1 + (uid * 7) % longest


def support_of(uid: int, length: int, num_scores: int) -> Tensor:
    """int32 [length, num_scores]"""
    grid = torch.arange(length)[:, None] * 31 + torch.arange(num_scores) * 7 + uid
    return (grid % 997).to(torch.int32)


def weights_of(version: int) -> dict[str, Tensor]:
    """Large enough that a torn copy would be seen."""
    return {
        "body.weight": torch.full((300, 70), float(version)),
        "head.bias": torch.full((13,), float(version), dtype=torch.bfloat16),
    }


class FakeRollout:
    def __init__(self, fake: Fake) -> None:
        self.fault = Fault(fake)
        self.fake = fake
        self.places = PLACES
        self.version = -1
        self.running: list[tuple[RolloutRequest, list[int]]] = []

    def active(self) -> int:
        return len(self.running)

    def submit(self, requests: list[RolloutRequest]) -> None:
        assert len(requests) <= self.places - self.active()
        self.running += [(request, []) for request in requests]

    def step(self) -> list[Rollout]:
        self.fault()
        self.fake.sleep(self.fake.decode_s)
        for _, versions in self.running:
            versions.append(self.version)
        if self.fault.kind == "endless" and self.fault.left < 0:
            return []
        done = [r for r in self.running if len(r[1]) == length_of(r[0].uid, self.fake.longest)]
        self.running = [r for r in self.running if r not in done]
        return [self.finish(request, versions) for request, versions in done]

    def finish(self, request: RolloutRequest, versions: list[int]) -> Rollout:
        ids = support_of(request.uid, len(versions), self.fake.num_scores)
        return Rollout(
            uid=request.uid,
            prompt_ids=request.prompt_ids,
            response_ids=torch.arange(len(versions), dtype=torch.int32),
            versions=torch.tensor(versions, dtype=torch.int32),
            ids=ids,
            log_weights=ids * 0.25,
            correct=request.uid % 2 == 0,
        )

    def load_weights(self, named: dict[str, Tensor], version: int) -> None:
        for _ in range(2):  # reads, dawdles, and reads again: nobody may have written meanwhile
            for name, expected in weights_of(version).items():
                assert torch.equal(named[name], expected), f"{name} is not version {version}"
            self.fake.sleep(self.fake.load_s)
        assert version > self.version
        self.version = version


class FakeScorer:
    def __init__(self, fake: Fake) -> None:
        self.fault = Fault(fake)
        self.fake = fake

    def score(self, slot: SlotView) -> None:
        self.fault()
        self.fake.sleep(self.fake.score_s)
        assert slot.num_sequences > 0
        slot.teacher_logprobs.copy_(slot.ids * -0.5)


class FakeLearner:
    def __init__(self, fake: Fake) -> None:
        self.fault = Fault(fake)
        self.fake = fake
        self.version = 0

    def weight_spec(self) -> list[TensorSpec]:
        return [] if self.fake.bare else specs_of(weights_of(0))

    def named_weights(self) -> dict[str, Tensor]:
        return weights_of(self.version)

    def step(self, batch: list[tuple[SlotView, list[int]]]) -> dict[str, float]:
        self.fault()
        self.fake.sleep(self.fake.step_s)
        for slot, indices in batch:
            for index in indices:
                self.check(slot, index)
        self.version += 1
        loss: Any = 1.0 / self.version
        return {"loss": torch.tensor(loss, requires_grad=True) if self.fake.tensors else loss}

    def check(self, slot: SlotView, index: int) -> None:
        """The sequence is what its uid says, whole, and scored."""
        span, uid = slot.spans()[index], int(slot.uids[index])
        rows = slice(span.row, span.row + span.response_length)
        tokens = slot.tokens[span.start :][: span.prompt_length + span.response_length].tolist()
        ids = support_of(uid, span.response_length, self.fake.num_scores)
        assert span.response_length == length_of(uid, self.fake.longest)
        assert tokens == prompt_of(uid) + list(range(span.response_length))
        assert torch.equal(slot.ids[rows], ids)
        assert torch.equal(slot.log_weights[rows], ids * 0.25)
        assert torch.equal(slot.teacher_logprobs[rows], ids * -0.5)
        if self.fake.log:
            versions = slot.versions[rows].tolist()
            line = json.dumps({"uid": uid, "at": self.version, "versions": versions})
            with Path(self.fake.log).open("a") as file:
                file.write(line + "\n")

    def save(self, path: str) -> None:
        Path(path).write_text("half")
        if self.fake.mark:
            Path(self.fake.mark).touch()
        time.sleep(self.fake.save_s)
        Path(path).write_text(str(self.version))


def factories(fake: Fake) -> dict[str, Any]:
    """The keyword arguments of run_pipeline that build the fakes."""
    return {
        "rollout": partial(FakeRollout, fake),
        "teacher": partial(FakeScorer, fake),
        "learner": partial(FakeLearner, fake),
        "prompts": prompt_of,
    }


def config(**changes: Any) -> PipelineConfig:
    """A small run: 6 steps of 8 sequences."""
    values: dict[str, Any] = {
        "mode": "async",
        "steps": 6,
        "batch_size": 8,
        "sequences_per_slot": 4,
        "max_staleness": 2,
        "max_prompt_tokens": 4,
        "max_response_tokens": 9,
        "num_scores": 3,
        "stall_timeout_s": 20.0,
        "startup_timeout_s": 60.0,
    }
    return PipelineConfig(**(values | changes))
