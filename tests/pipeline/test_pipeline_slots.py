"""Slots: what goes in comes out, packed, aligned and shared."""

from __future__ import annotations

import itertools
import multiprocessing as mp
from typing import Any

import pytest
import torch
from pipeline_fakes import Fake, config, factories, memfds, support_of

from asyncopd.pipeline import Rollout, SlotArena, SlotSpec, run_pipeline
from asyncopd.pipeline import shared as shared_module
from asyncopd.pipeline.shared import ALIGNMENT, SharedBytes

SPEC = SlotSpec(num_slots=3, max_sequences=4, max_tokens=40, max_response_tokens=17, num_scores=5)


def rollout(uid: int, prompt: int, response: int, *, support: bool = True) -> Rollout:
    ids = support_of(uid, response, SPEC.num_scores) if support else None
    return Rollout(
        uid=uid,
        prompt_ids=list(range(100, 100 + prompt)),
        response_ids=torch.arange(response, dtype=torch.int32),
        versions=torch.arange(uid, uid + response, dtype=torch.int32),
        ids=ids,
        log_weights=None if ids is None else ids * 0.5,
    )


def test_ragged_round_trip() -> None:
    arena = SlotArena(SPEC)
    slot = arena.slot(1)
    sequences = [rollout(2**40, 3, 5), rollout(8, 1, 1), rollout(9, 7, 4)]
    sequences[0].versions = torch.zeros(5, dtype=torch.int32)
    assert all(slot.append(r) for r in sequences)
    reader = arena.slot(1)  # another view of the same memory
    assert (reader.num_sequences, reader.num_tokens, reader.num_response_tokens) == (3, 21, 10)
    assert reader.uids.tolist() == [2**40, 8, 9]
    assert reader.prompt_lengths.tolist() == [3, 1, 7]
    assert reader.response_lengths.tolist() == [5, 1, 4]
    for span, r in zip(reader.spans(), sequences, strict=True):
        tokens = reader.tokens[span.start :][: span.prompt_length + span.response_length]
        assert tokens.tolist() == r.prompt_ids + r.response_ids.tolist()
        rows = slice(span.row, span.row + span.response_length)
        assert torch.equal(reader.versions[rows], r.versions)
        assert torch.equal(reader.ids[rows], r.ids)
        assert torch.equal(reader.log_weights[rows], r.log_weights)
    assert reader.teacher_logprobs.shape == (10, 5)
    assert (reader.teacher_logprobs == -torch.inf).all()
    reader.teacher_logprobs.fill_(-1.5)  # zero-copy: the other view sees it
    assert (slot.teacher_logprobs == -1.5).all()
    assert arena.slot(0).num_sequences == arena.slot(2).num_sequences == 0
    slot.clear()
    assert reader.num_sequences == reader.tokens.numel() == 0


def test_support_that_the_teacher_will_choose_is_left_unset() -> None:
    slot = SlotArena(SPEC).slot(0)
    assert slot.append(rollout(1, 2, 3))  # something that an old tenant could leave behind
    slot.clear()
    assert slot.append(rollout(1, 2, 3, support=False))
    assert (slot.ids == -1).all()
    assert (slot.log_weights == -torch.inf).all()


def test_views_are_aligned_typed_and_do_not_overlap() -> None:
    arena = SlotArena(SPEC)
    ranges = []
    for index in range(SPEC.num_slots):
        for spec in SPEC.tensors():
            view = arena.slot(index)._full[spec.name]
            offset = view.data_ptr() - arena._memory.data_ptr()
            assert offset % ALIGNMENT == 0
            assert (view.dtype, tuple(view.shape)) == (spec.dtype, spec.shape)
            ranges.append((offset, offset + spec.nbytes))
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert ranges[-1][1] <= SPEC.nbytes


def test_append_says_no_when_it_does_not_fit() -> None:
    slot = SlotArena(SPEC).slot(0)
    for uid in range(4):
        assert slot.append(rollout(uid, 1, 1))
    assert not slot.append(rollout(4, 1, 1))  # sequences
    slot.clear()
    assert slot.append(rollout(0, 1, 10))
    assert not slot.append(rollout(1, 1, 8))  # response tokens
    assert slot.append(rollout(1, 1, 7))
    slot.clear()
    assert slot.append(rollout(0, 35, 1))
    assert not slot.append(rollout(1, 4, 1))  # tokens
    assert slot.num_sequences == 1


def test_bad_sequences_are_named() -> None:
    slot = SlotArena(SPEC).slot(0)
    with pytest.raises(ValueError, match=r"sequence 5: the response is empty"):
        slot.append(rollout(5, 2, 0))
    with pytest.raises(ValueError, match=r"sequence 6: .* exceed a whole slot"):
        slot.append(rollout(6, 2, 18))
    bad = rollout(7, 2, 3)
    bad.ids = torch.zeros(3, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sequence 7: ids has shape \(3, 4\), expected \(3, 5\)"):
        slot.append(bad)
    assert slot.num_sequences == 0
    with pytest.raises(IndexError, match="slot 3 of 3"):
        SlotArena(SPEC).slot(3)
    with pytest.raises(ValueError, match=r"SlotSpec\.num_scores must be at least 1"):
        SlotSpec(1, 1, 1, 1, 0)
    with pytest.raises(ValueError, match="memory has 64 bytes, the arena needs"):
        SlotArena(SPEC, torch.zeros(64, dtype=torch.uint8))


def test_bytes_per_response_token() -> None:
    assert SPEC.bytes_per_response_token == 4 + 4 + 5 * 12


def _write(memory: SharedBytes) -> None:
    SlotArena(SPEC, memory.tensor()).slot(2).append(rollout(77, 2, 3))


def test_another_process_writes_and_no_name_is_needed() -> None:
    memory = SharedBytes()
    memory.resize(SPEC.nbytes, holds="a test", lower="nothing")
    child = mp.get_context("spawn").Process(target=_write, args=(memory,))
    child.start()
    child.join()
    arena = SlotArena(SPEC, memory.tensor())
    memory.close()
    memory.close()  # harmless
    assert arena.slot(2).uids.tolist() == [77]


def test_too_little_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "available_memory", lambda: 2**20)
    with pytest.raises(MemoryError, match=r"5 slots .* 3 MiB .* 1 MiB are available; lower num_s"):
        SharedBytes().resize(3 * 2**20, holds="5 slots", lower="num_slots")


def test_memory_that_others_were_promised_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has written to the slots yet, so the machine counts their pages as available."""
    monkeypatch.setattr(shared_module, "available_memory", lambda: 10 * 2**20)
    slots, weights = SharedBytes(), SharedBytes()
    slots.resize(7 * 2**20, holds="slots", lower="num_slots")
    with pytest.raises(MemoryError, match="7 MiB of shared memory, and 3 MiB are available besides 7 MiB that are"):
        weights.resize(7 * 2**20, holds="weights", lower="the student", reserved=7 * 2**20)
    weights.resize(3 * 2**20, holds="weights", lower="the student", reserved=7 * 2**20)


@pytest.mark.usefixtures("quick_start")
def test_run_checks_slots_and_weights_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    resize = SharedBytes.resize

    def spy(memory: SharedBytes, nbytes: int, **words: Any) -> None:
        seen.append((nbytes, words.get("reserved", 0)))
        resize(memory, nbytes, **words)

    monkeypatch.setattr(SharedBytes, "resize", spy)
    run_pipeline(config(steps=1), **factories(Fake()))
    (slots, nothing), (_, reserved) = seen
    assert (nothing, reserved) == (0, slots)


def test_memory_is_given_back_without_close() -> None:
    before = memfds()
    memory = SharedBytes()
    ours = memfds() - before
    assert len(ours) == 1
    del memory
    assert not ours & memfds()


def test_platform_without_memfd_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(shared_module.os, "memfd_create")
    with pytest.raises(RuntimeError, match="only Linux has"):
        SharedBytes()


def test_available_memory_minds_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   1000 kB",
        "/sys/fs/cgroup/memory.max": "500000",
        "/sys/fs/cgroup/memory.current": "100000",
    }
    monkeypatch.setattr(shared_module, "_read", lambda path: files.get(path, ""))
    assert shared_module.available_memory() == 400_000
    files["/sys/fs/cgroup/memory.stat"] = "anon 20000\ninactive_file 70000\nactive_file 5"
    assert shared_module.available_memory() == 470_000  # clean cache makes room
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert shared_module.available_memory() == 1_024_000
