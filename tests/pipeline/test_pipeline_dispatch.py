"""The supervisor's decisions, message by message, with workers played in this process."""

from __future__ import annotations

import random
import time

import pytest
from pipeline_fakes import config
from supervisor_simulation import Played, Simulation

from asyncopd.pipeline import StallError
from asyncopd.pipeline import messages as msg
from asyncopd.pipeline.supervisor import TICK_S, Harvest


@pytest.mark.parametrize("slots", ["derived", "few"])
@pytest.mark.parametrize("late", ["wait", "refuse"])
@pytest.mark.parametrize("eta", range(5))
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_somebody_owes_something_after_every_dispatch(mode: str, eta: int, late: str, slots: str) -> None:
    """Else the watch would call a healthy run locked up. The simulation asserts it at each dispatch."""
    refused = 0
    for seed in range(8):
        rng = random.Random(seed)
        per_slot, workers, longest = rng.choice([1, 2, 4]), rng.choice([2, 3, 4]), rng.choice([1, 5, 40])
        batch = per_slot * rng.choice([1, 2, 4])
        settings = config(
            mode=mode,
            steps=12,
            batch_size=batch,
            sequences_per_slot=per_slot,
            max_staleness=eta,
            late=late,
            rollout_workers=workers,
            num_slots=None if slots == "derived" else batch // per_slot + workers + 1,
        )
        lengths = [longest * 3 if uid % 5 == 0 else 1 + (uid * 7919) % longest for uid in range(1000)]
        simulation = Simulation(settings, rng.choice([1, 3, 8, 32]), lambda uid, n=lengths: n[uid % 1000])
        lazy = frozenset({workers - 1}) if seed % 2 else frozenset()
        simulation.run(rng, attention=rng.choice([0.02, 0.2, 0.8]), lazy=lazy)
        refused += simulation.scheduler.refused
        assert len(simulation.batches) == 12
        assert all(max(batch.staleness) <= eta for batch in simulation.batches)
        if slots == "derived":  # pacing is the limit, slots are not
            assert simulation.fewest_free > 0
            assert all(len(taken.sequences) == batch for taken in simulation.batches)
    if mode == "async" and slots == "derived" and eta in (1, 2):
        assert (refused > 0) == (late == "refuse")


def fill(simulation: Simulation, uids: list[int], version: int) -> None:
    """The only rollout worker hands in its slot; the supervisor acts on it."""
    slot = simulation.scheduler._filling[0]
    assert slot is not None
    infos = [msg.SequenceInfo(uid, version, 5, None) for uid in uids]
    simulation.book(0, msg.SlotFilled(slot, infos, msg.StageStats()))
    simulation.dispatch()


def train(simulation: Simulation, uids: list[int], version: int) -> None:
    """Fill a slot with these, score it, train on it, and load what comes of it."""
    slot = simulation.scheduler._filling[0]
    fill(simulation, uids, version)
    for index, message in (
        (1, msg.SlotScored(slot or 0, msg.StageStats())),
        (2, msg.StepDone({}, msg.StageStats())),
        (2, msg.Published((version + 1) % 2, version + 1)),
        (0, msg.WeightsLoaded(version + 1)),
    ):
        simulation.book(index, message)
        simulation.dispatch()


def test_refused_prompts_go_out_in_the_same_dispatch() -> None:
    """The pair overtaken twice comes home expired when it is all that the run waits for."""
    settings = config(steps=3, batch_size=2, sequences_per_slot=2, max_staleness=1, late="refuse")
    simulation = Simulation(settings, 8, lambda uid: 1)
    simulation.book(2, msg.Published(0, 0))
    simulation.book(0, msg.WeightsLoaded(0))
    simulation.dispatch()
    train(simulation, [0, 1], 0)
    train(simulation, [4, 5], 1)
    fill(simulation, [2, 3], 0)
    assert simulation.scheduler.refused == 2
    granted = [message for message in simulation.workers[0].inbox if isinstance(message, msg.Prompts)]
    assert [request.uid for request in granted[-1].requests] == [2, 3]


# --- watching ---


def watched(silent_s: float, **changes: float) -> tuple[Simulation, Played]:
    """A run with one second of patience whose rollout worker was heard of ``silent_s`` ago."""
    simulation = Simulation(config(stall_timeout_s=1.0, **changes), 6, lambda uid: 1)
    simulation.book(2, msg.Published(0, 0))
    simulation.book(0, msg.WeightsLoaded(0))
    simulation.dispatch()
    now, supervisor = time.monotonic(), simulation.supervisor
    supervisor._timeout_s = 1.0
    supervisor._watched = now - TICK_S
    supervisor._harvests = [Harvest(now)]
    simulation.workers[0].contact = now - silent_s
    return simulation, simulation.workers[0]


def test_silent_worker_is_stuck() -> None:
    simulation, _ = watched(1.5)
    with pytest.raises(StallError, match=r"'rollout-0' is stuck: silent for 1\.. s, it owes \d+ sequences"):
        simulation.supervisor._watch()


def test_unread_words_are_heard_before_a_worker_is_called_silent() -> None:
    simulation, worker = watched(1.5)
    worker.outbox.append(msg.Progress(msg.StageStats()))
    simulation.supervisor._watch()


def test_pause_of_the_supervisor_is_nobodys_silence() -> None:
    """After SIGSTOP and SIGCONT of the whole group nobody has said anything."""
    simulation, worker = watched(1.5)
    simulation.supervisor._watched -= 1.5
    simulation.supervisor._watch()
    worker.contact -= 1.0  # and it stays silent
    simulation.supervisor._next_tick = 0.0
    with pytest.raises(StallError):
        simulation.supervisor._watch()


def test_worker_that_steps_without_finishing_is_stuck_by_steps_and_time() -> None:
    """4 prompt and 9 response tokens: 13 steps may pass between two finished sequences."""
    simulation, _ = watched(0.0)
    supervisor = simulation.supervisor

    def watch(steps: int, seconds: float, tokens: int = 0) -> None:
        simulation.book(0, msg.Progress(msg.StageStats(steps=steps, tokens=tokens)))
        supervisor._harvests[0].at -= seconds
        supervisor._next_tick = 0.0
        supervisor._watch()

    watch(13, 5.0)  # slow
    watch(30, 0.0, tokens=9)  # something came
    watch(99, 0.5)  # quick
    with pytest.raises(StallError, match=r"'rollout-0' is stuck: 70 decode steps in 2\.. s without finishing .* owes"):
        watch(100, 1.5)
