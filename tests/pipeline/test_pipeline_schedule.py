"""The scheduler as a state machine: no process, no tensor."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from asyncopd.pipeline.messages import SequenceInfo
from asyncopd.pipeline.pacing import AsyncPacing, Books, Pacing, SyncPacing
from asyncopd.pipeline.schedule import Scheduler


def make(
    *,
    mode: str = "async",
    steps: int = 10,
    batch: int = 8,
    per_slot: int = 4,
    eta: int = 1,
    slots: int = 32,
    places: tuple[int, ...] = (100,),
    wait: bool = True,
) -> Scheduler:
    pacing: Pacing = SyncPacing() if mode == "sync" else AsyncPacing(eta)
    scheduler = Scheduler(
        pacing,
        steps=steps,
        batch_size=batch,
        sequences_per_slot=per_slot,
        max_staleness=eta,
        num_slots=slots,
        places=places,
        next_prompt=lambda uid: [uid],
        wait_for_late=wait,
    )
    for worker in range(len(places)):
        scheduler.weights_loaded(worker, 0)
    return scheduler


def granted(scheduler: Scheduler) -> dict[int, list[int]]:
    scheduler.refuse_expired()
    return {w: [r.uid for r in rs] for w, rs in scheduler.prompts_to_grant()}


def hand_in(scheduler: Scheduler, worker: int, uids: list[int], version: int = 0) -> int:
    """``worker`` gets a slot if it has none, and hands it in with these sequences."""
    scheduler.slots_to_fill()
    slot = scheduler._filling[worker]
    assert slot is not None
    scheduler.slot_filled(worker, slot, [SequenceInfo(uid, version, 5, None) for uid in uids])
    return slot


def score_all(scheduler: Scheduler) -> list[int]:
    slots = []
    while (slot := scheduler.slot_to_score()) is not None:
        scheduler.slot_scored(slot)
        slots.append(slot)
    return slots


# --- pacing ---


@pytest.mark.parametrize("eta", [0, 1, 4])
def test_admission_formula(eta: int) -> None:
    """Outstanding stays below (eta + 1 - (L - v)) * B, at a fresh and at a lagging worker."""
    pacing, batch = AsyncPacing(eta), 8
    for lag in range(eta + 3):
        for outstanding in (0, 7, 8, 40):
            books = Books(batch, 10, outstanding, outstanding, (10 - lag,))
            assert pacing.room(books, 0) == (eta + 1 - lag) * batch - outstanding
    scheduler = make(eta=eta)
    assert granted(scheduler) == {0: list(range((eta + 1) * batch))}
    assert granted(scheduler) == {}


@pytest.mark.parametrize("eta", [0, 1, 4])
def test_worker_without_new_weights_gets_no_prompt_that_would_expire(eta: int) -> None:
    scheduler = make(eta=eta, batch=4)
    uids = granted(scheduler)[0]
    for step in range(eta + 1):
        hand_in(scheduler, 0, uids[4 * step :][:4])
        score_all(scheduler)
        assert scheduler.batch_to_train() is not None
        scheduler.step_done()
        assert granted(scheduler) == {}  # L moved on, the worker did not
    scheduler.weights_loaded(0, scheduler.version)
    assert len(granted(scheduler)[0]) == (eta + 1) * 4


def test_never_more_prompts_than_the_run_needs() -> None:
    scheduler = make(steps=2, batch=8, eta=4)
    assert len(granted(scheduler)[0]) == 16
    assert granted(scheduler) == {}


def test_two_workers_share_a_small_batch() -> None:
    scheduler = make(eta=0, batch=8, places=(100, 100))
    assert {w: len(uids) for w, uids in granted(scheduler).items()} == {0: 4, 1: 4}


def test_worker_is_not_flooded_beyond_what_keeps_it_busy() -> None:
    scheduler = make(eta=9, batch=64, per_slot=4, places=(8,))
    assert len(granted(scheduler)[0]) == 8 + 4 + 2


# --- batches ---


def test_batch_smaller_than_the_scoring_batch_never_trains() -> None:
    """Bug of another implementation. Here two sequences in a slot for four are scored and train."""
    scheduler = make(steps=1, batch=2, per_slot=4, eta=0)
    assert granted(scheduler) == {0: [0, 1]}
    hand_in(scheduler, 0, [0, 1])
    assert score_all(scheduler)
    batch = scheduler.batch_to_train()
    assert batch is not None
    assert [info.uid for info in batch.sequences] == [0, 1]
    scheduler.step_done()
    assert scheduler.done


def test_partial_slots_make_up_a_batch_and_a_slot_is_split() -> None:
    scheduler = make(batch=4, per_slot=4, eta=1)
    granted(scheduler)
    first, second = hand_in(scheduler, 0, [0, 1, 2]), hand_in(scheduler, 0, [3, 4, 5])
    score_all(scheduler)
    batch = scheduler.batch_to_train()
    assert batch is not None
    assert batch.parts == [(first, [0, 1, 2]), (second, [0])]
    assert scheduler.batch_to_train() is None  # one step at a time
    scheduler.step_done()
    assert scheduler.batch_to_train() is None  # two left, four needed
    third = hand_in(scheduler, 0, [6, 7])
    score_all(scheduler)
    batch = scheduler.batch_to_train()
    assert batch is not None
    assert batch.parts == [(second, [1, 2]), (third, [0, 1])]
    assert batch.staleness == [1] * 4
    scheduler.step_done()
    assert scheduler.outstanding == 0
    assert scheduler.slot_states()["ready"] == scheduler.slot_states()["training"] == 0


def test_oldest_slot_trains_first() -> None:
    scheduler = make(batch=4, per_slot=4, eta=4, wait=False)
    granted(scheduler)
    scheduler.version = 2
    young = hand_in(scheduler, 0, [0, 1, 2, 3], version=2)
    old = hand_in(scheduler, 0, [4, 5, 6, 7], version=1)
    assert score_all(scheduler) == [young, old]
    batch = scheduler.batch_to_train()
    assert batch is not None
    assert batch.parts[0][0] == old


def test_no_free_slot_trains_what_is_ready_instead_of_locking_up() -> None:
    scheduler = make(batch=4, per_slot=4, eta=0, slots=2)
    granted(scheduler)
    hand_in(scheduler, 0, [0])
    hand_in(scheduler, 0, [1])
    score_all(scheduler)
    assert scheduler.slots_to_fill() == []
    batch = scheduler.batch_to_train()
    assert batch is not None
    assert [info.uid for info in batch.sequences] == [0, 1]


# --- refusal ---


def test_expired_sequences_are_refused_and_their_prompts_queued_again() -> None:
    scheduler = make(batch=4, per_slot=4, eta=1, steps=10)
    assert granted(scheduler)[0] == list(range(8))
    scheduler.slots_to_fill()
    scheduler.version = 2
    scheduler.weights_loaded(0, 2)
    slot = scheduler._filling[0]
    assert slot is not None
    ages = [0, 1, 0, 2]
    scheduler.slot_filled(0, slot, [SequenceInfo(u, v, 5, None) for u, v in enumerate(ages)])
    assert scheduler.refused == 0  # in the decisions nothing is refused
    scheduler.refuse_expired()
    assert scheduler.refused == 2
    score_all(scheduler)
    again = granted(scheduler)[0]
    assert again[:2] == [0, 2]  # before new ones
    hand_in(scheduler, 0, [4, 5, 6, 7], version=2)
    score_all(scheduler)
    batch = scheduler.batch_to_train()
    assert batch is not None
    assert batch.parts[0] == (slot, [1, 3])  # the rest of that slot is used


def test_slot_of_nothing_but_expired_sequences_is_freed_unscored() -> None:
    scheduler = make(batch=4, per_slot=4, eta=0)
    granted(scheduler)
    hand_in(scheduler, 0, [0, 1, 2, 3], version=0)
    scheduler.version = 1
    scheduler.refuse_expired()
    assert scheduler.slot_to_score() is None
    assert scheduler.refused == 4
    assert scheduler.outstanding == 0
    assert scheduler.slot_states()["free"] == 32


# --- sync ---


def test_sync_works_strictly_in_turn() -> None:
    scheduler = make(mode="sync", batch=8, per_slot=4, eta=0, places=(2, 2), steps=3)
    for version in range(3):
        uids = granted(scheduler)
        assert {w: len(u) for w, u in uids.items()} == {0: 4, 1: 4}  # all at once
        hand_in(scheduler, 0, uids[0], version)
        assert scheduler.slot_to_score() is None  # worker 1 still rolls out
        hand_in(scheduler, 1, uids[1][:3], version)
        assert scheduler.slot_to_score() is None
        hand_in(scheduler, 1, uids[1][3:], version)
        first = scheduler.slot_to_score()
        assert first is not None
        scheduler.slot_scored(first)
        assert scheduler.batch_to_train() is None  # two slots not scored
        assert len(score_all(scheduler)) == 2
        batch = scheduler.batch_to_train()
        assert batch is not None
        assert batch.staleness == [0] * 8
        assert granted(scheduler) == {}
        scheduler.step_done()
        assert granted(scheduler) == {}  # nobody has the new weights
        scheduler.weights_loaded(0, version + 1)
        assert granted(scheduler) == {}  # not everybody has them
        scheduler.weights_loaded(1, version + 1)
    assert scheduler.done


# --- whole runs with events in random order ---


@dataclass
class Simulation:
    """Plays workers that finish in random order (or in turn, ``fifo``) at random moments."""

    scheduler: Scheduler
    rng: random.Random
    per_slot: int
    fifo: bool = False
    lazy: set[int] = field(default_factory=set)  # workers that act rarely
    rolling: dict[int, list[SequenceInfo]] = field(default_factory=dict)
    loaded: dict[int, int] = field(default_factory=dict)
    consumed: list[int] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)

    def run(self, workers: int) -> None:
        self.rolling = {w: [] for w in range(workers)}
        self.loaded = dict.fromkeys(range(workers), 0)
        scoring: list[int] = []
        training = False
        for _ in range(100_000):
            if self.scheduler.done:
                return
            self.dispatch()
            if (slot := self.scheduler.slot_to_score()) is not None:
                scoring.append(slot)
            if not training and (batch := self.scheduler.batch_to_train()) is not None:
                training = True
                assert len(batch.sequences) == self.scheduler.batch_size
                assert max(batch.staleness) <= self.scheduler.max_staleness
                self.consumed += [info.uid for info in batch.sequences]
                self.staleness += batch.staleness
            event = self.rng.choice(["rollout", "rollout", "rollout", "score", "train", "load"])
            worker = self.rng.randrange(workers)
            if worker in self.lazy and self.rng.random() < 0.95:
                continue
            if event == "rollout":
                self.finish(worker)
            elif event == "score" and scoring:
                self.scheduler.slot_scored(scoring.pop(0))
            elif event == "train" and training:
                training = False
                self.scheduler.step_done()
            elif event == "load":
                self.loaded[worker] = self.scheduler.version
                self.scheduler.weights_loaded(worker, self.scheduler.version)
        pytest.fail(f"the run locked up: {self.scheduler.slot_states()}")

    def dispatch(self) -> None:
        self.scheduler.refuse_expired()
        self.scheduler.slots_to_fill()
        for worker, requests in self.scheduler.prompts_to_grant():
            version = self.loaded[worker]
            self.rolling[worker] += [SequenceInfo(r.uid, version, 1, None) for r in requests]

    def finish(self, worker: int) -> None:
        slot = self.scheduler._filling[worker]
        rolling = self.rolling[worker]
        if slot is None or not rolling:
            return
        if not self.fifo:
            self.rng.shuffle(rolling)
        count = min(len(rolling), self.per_slot)
        if not self.fifo:
            count = self.rng.randint(1, count)
        self.scheduler.slot_filled(worker, slot, rolling[:count])
        del rolling[:count]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("eta", [0, 1, 4])
def test_first_in_first_out_nothing_is_ever_refused(eta: int, seed: int) -> None:
    scheduler = make(steps=40, batch=8, per_slot=4, eta=eta, slots=64)
    simulation = Simulation(scheduler, random.Random(seed), 4, fifo=True)
    simulation.run(1)
    assert scheduler.refused == 0
    assert simulation.consumed == list(range(320))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("eta", [0, 1, 4])
@pytest.mark.parametrize(("mode", "wait"), [("sync", True), ("async", True), ("async", False)])
def test_every_prompt_is_consumed_once_or_still_outstanding(mode: str, wait: bool, eta: int, seed: int) -> None:
    scheduler = make(mode=mode, steps=30, eta=eta, slots=100, places=(5, 9, 3), wait=wait)
    simulation = Simulation(scheduler, random.Random(seed), 4)
    simulation.run(3)
    uids = simulation.consumed
    assert len(uids) == len(set(uids)) == 30 * 8
    assert scheduler.outstanding == 0  # at the end nobody works for nothing
    again = {request.uid for request in scheduler._again}
    assert set(range(scheduler._uids)) == set(uids) | again


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("eta", [0, 1, 4])
def test_staleness_bound_is_not_a_bound_with_a_straggler(eta: int, wait: bool) -> None:
    """Bug of another implementation (20 consumed where 1 was allowed). Here it is a bound."""
    scheduler = make(steps=60, eta=eta, slots=100, places=(8, 8), wait=wait)
    simulation = Simulation(scheduler, random.Random(0), 4, lazy={1})
    simulation.run(2)
    assert max(simulation.staleness) <= eta
    assert len(set(simulation.consumed)) == 60 * 8
    if eta:  # else nobody can be late
        assert (scheduler.refused == 0) == wait


def test_learner_waits_for_a_late_sequence_and_takes_it_first() -> None:
    scheduler = make(batch=4, per_slot=4, eta=1, steps=10)
    granted(scheduler)  # 0 to 7, from version 0
    hand_in(scheduler, 0, [0, 1, 2, 3])
    score_all(scheduler)
    assert scheduler.batch_to_train() is not None  # 4 to 7 will be 1 step old: allowed
    scheduler.step_done()
    scheduler.weights_loaded(0, 1)
    assert granted(scheduler)[0] == [8, 9, 10, 11]
    hand_in(scheduler, 0, [8, 9, 10, 11], version=1)  # they overtake
    score_all(scheduler)
    assert scheduler.batch_to_train() is None
    hand_in(scheduler, 0, [4, 5, 6, 7])
    assert scheduler.batch_to_train() is None  # not scored
    score_all(scheduler)
    batch = scheduler.batch_to_train()
    assert batch is not None
    assert [info.uid for info in batch.sequences] == [4, 5, 6, 7]


def test_batch_is_the_oldest_sequences_wherever_they_lie() -> None:
    scheduler = make(batch=4, per_slot=4, eta=4, wait=False)
    granted(scheduler)
    scheduler.version = 3
    slots = []
    for uids, versions in (([0, 1, 2, 3], [1, 2, 1, 2]), ([4, 5, 6, 7], [2, 0, 2, 1])):
        scheduler.slots_to_fill()
        slot = scheduler._filling[0]
        assert slot is not None
        infos = [SequenceInfo(uid, version, 5, None) for uid, version in zip(uids, versions, strict=True)]
        scheduler.slot_filled(0, slot, infos)
        slots.append(slot)
    score_all(scheduler)
    batch = scheduler.batch_to_train()
    assert batch is not None
    assert sorted(batch.parts) == sorted([(slots[1], [1, 3]), (slots[0], [0, 2])])
    assert sorted(batch.staleness) == [2, 2, 2, 3]
