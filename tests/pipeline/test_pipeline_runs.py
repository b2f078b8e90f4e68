"""Whole runs in real processes with engines that sleep."""

from __future__ import annotations

import json
import multiprocessing as mp
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pipeline_fakes import Fake, config, factories, length_of, memfds, prompt_of

from asyncopd.pipeline import PipelineStatus, RunResult, run_pipeline

pytestmark = pytest.mark.usefixtures("quick_start")


def train(tmp_path: Path, fake: Fake, **changes: Any) -> tuple[RunResult, list[dict[str, Any]]]:
    """Run, and return the result with what the learner noted of each sequence."""
    fake.log = str(tmp_path / "log")
    result = run_pipeline(config(**changes), **factories(fake))
    assert mp.active_children() == []
    assert memfds() == set()
    lines = [json.loads(line) for line in Path(fake.log).read_text().splitlines()]
    uids = [line["uid"] for line in lines]
    assert len(uids) == len(set(uids)) == result.consumed_sequences
    for line in lines:
        staleness = line["at"] - min(line["versions"])
        assert 0 <= staleness <= result.staleness_max <= changes.get("max_staleness", 2)
    if "num_slots" not in changes:  # short batches are for want of slots only
        sizes = Counter(line["at"] for line in lines)
        assert sizes == dict.fromkeys(range(result.steps), changes.get("batch_size", 8))
    return result, lines


@pytest.mark.parametrize(("mode", "workers"), [("async", 1), ("async", 2), ("sync", 2)])
def test_run_completes(tmp_path: Path, mode: str, workers: int) -> None:
    metrics: list[dict[str, float]] = []
    status: list[PipelineStatus] = []
    path = tmp_path / "out" / "final"
    result = run_pipeline(
        config(mode=mode, steps=12, rollout_workers=workers),
        **factories(Fake(step_s=0.03)),
        on_step=metrics.append,
        on_tick=status.append,
        checkpoint=path,
    )
    assert mp.active_children() == []
    assert path.read_text() == "12"
    assert result.checkpoint == str(path)
    assert (result.steps, result.consumed_sequences) == (12, 96)
    assert result.staleness_max <= (0 if mode == "sync" else 2)
    assert result.staleness_mean <= result.staleness_max
    assert result.cache_bytes_per_token == 8 + 12 * 3
    assert result.stage_tokens["learner"] == result.consumed_tokens
    assert result.stage_tokens["teacher"] >= result.consumed_tokens
    assert result.stage_busy_seconds["learner"] >= 12 * 0.03
    assert 0 < result.overlap <= 3
    assert 0 < result.stage_cpu_seconds["learner"] < result.stage_busy_seconds["learner"]  # it sleeps
    assert result.cpu_overlap == sum(result.stage_cpu_seconds.values()) / result.wall_seconds
    assert result.learner_tokens_per_second == result.consumed_tokens / result.wall_seconds
    assert [m["step"] for m in metrics] == list(range(1, 13))
    assert metrics[-1]["loss"] == pytest.approx(1 / 12)
    assert sum(m["learner/tokens"] for m in metrics) == result.consumed_tokens
    assert [m["sample/sequences"] for m in metrics] == [8] * 12
    assert all(0 <= m["rollout/accuracy"] <= 1 for m in metrics)
    for key in (
        "sample/staleness_mean",
        "sample/staleness_max",
        "sample/refused",
        "perf/rollout_wait_s",
        "perf/learner_wait_s",
        "rollout/backpressure_s",
        "rollout/tokens",
        "teacher/tokens",
    ):
        assert all(m[key] >= 0 for m in metrics)
    assert status
    slots = config(mode=mode, rollout_workers=workers).slot_count()
    assert all(sum(s.slots.values()) == slots for s in status)


def test_sync_consumes_in_order_what_it_rolled_out(tmp_path: Path) -> None:
    _, lines = train(tmp_path, Fake(), mode="sync", max_staleness=0)
    for line in lines:
        assert line["uid"] // 8 == line["at"]
        assert set(line["versions"]) == {line["at"]}


def test_async_versions_mix_in_flight_and_are_recorded(tmp_path: Path) -> None:
    """Weights arrive in the middle of a sequence: its later tokens carry the newer version."""
    _, lines = train(tmp_path, Fake(decode_s=0.004), steps=15, max_staleness=4)
    assert all(line["versions"] == sorted(line["versions"]) for line in lines)
    assert all(len(line["versions"]) == length_of(line["uid"], 9) for line in lines)
    assert any(len(set(line["versions"])) > 1 for line in lines)


def test_async_stages_overlap(tmp_path: Path) -> None:
    """The same work takes clearly less time than in turn."""
    fake = Fake(decode_s=0.002, score_s=0.005, step_s=0.012)
    turn, _ = train(tmp_path, fake, mode="sync", steps=20, max_staleness=4)
    (tmp_path / "log").unlink()
    free, _ = train(tmp_path, fake, mode="async", steps=20, max_staleness=4)
    assert free.learner_tokens_per_second > 1.2 * turn.learner_tokens_per_second
    assert free.overlap > 1.1 * turn.overlap


@pytest.mark.parametrize("late", ["wait", "refuse"])
@pytest.mark.parametrize("eta", [0, 1])
def test_staleness_bound_is_not_a_bound_with_a_straggler(tmp_path: Path, eta: int, late: str) -> None:
    """Bug of another implementation. Here one of two workers is 30 times slower, or 300 times.

    At 300 times the learner has long made its second step without the slow worker's first sequences,
    unless it waits for them; and it cannot make its last one before these have come.
    """
    fake = Fake(slow_worker="rollout-1", slow_s=0.15 if late == "refuse" and eta else 0.015)
    result, _ = train(tmp_path, fake, steps=12, rollout_workers=2, max_staleness=eta, late=late)
    assert result.steps == 12
    assert result.staleness_max <= eta
    assert (result.refused > 0) == (late == "refuse" and eta > 0)  # with eta 0 nothing can be overtaken


def test_slow_reader_never_sees_a_torn_version(tmp_path: Path) -> None:
    """The fake engine checks every weight, twice, 40 ms apart, while the learner steps on."""
    fake = Fake(slow_worker="rollout-1", slow_s=0.02, step_s=0.001)
    result, _ = train(tmp_path, fake, steps=15, rollout_workers=2, max_staleness=4)
    assert result.steps == 15


def test_few_slots_slow_the_run_down_and_do_not_stop_it(tmp_path: Path) -> None:
    fake = Fake(step_s=0.02)
    result, _ = train(tmp_path, fake, steps=8, num_slots=4, max_staleness=4)
    assert result.steps == 8
    assert result.backpressure_seconds > 0


def test_batch_smaller_than_the_scoring_batch_never_trains(tmp_path: Path) -> None:
    """Bug of another implementation. Here workers with 2 prompts hand in slots made for 4."""
    result, _ = train(tmp_path, Fake(), batch_size=4, max_staleness=0, rollout_workers=2, steps=3)
    assert result.consumed_sequences == 12


def test_runs_from_another_thread_and_takes_an_iterable(tmp_path: Path) -> None:
    results: list[RunResult] = []
    arguments = factories(Fake()) | {"prompts": (prompt_of(uid) for uid in range(16))}
    thread = threading.Thread(target=lambda: results.append(run_pipeline(config(steps=2), **arguments)))
    thread.start()
    thread.join()
    assert results[0].consumed_sequences == 16


def test_metrics_that_are_tensors_arrive_as_numbers(tmp_path: Path) -> None:
    metrics: list[dict[str, float]] = []
    run_pipeline(config(steps=2), **factories(Fake(tensors=True)), on_step=metrics.append)
    assert [type(m["loss"]) for m in metrics] == [float, float]


def test_save_may_take_longer_than_a_stall(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    run_pipeline(config(steps=2, stall_timeout_s=1.0), **factories(Fake(save_s=2.0)), checkpoint=path)
    assert path.read_text() == "2"
