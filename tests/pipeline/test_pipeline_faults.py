"""What goes wrong ends the run within seconds, is named, and leaves nothing behind."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pipeline_fakes import Fake, config, factories, memfds, prompt_of

from asyncopd.pipeline import StallError, WorkerError, processes, run_pipeline, supervisor

pytestmark = pytest.mark.usefixtures("quick_start")

ROLES = ("rollout-0", "teacher", "learner")
SECONDS = 5.0  # "within seconds", on a busy machine


def fail(tmp_path: Path, worker: str, kind: str, **changes: Any) -> tuple[Exception, float]:
    """Run until the fault ends the run; returns the error and how long that took."""
    mark = tmp_path / "mark"
    fake = Fake(faults={worker: kind}, fault_after=40 if worker == "rollout-0" else 3)
    fake.mark = str(mark)
    with pytest.raises((WorkerError, StallError)) as caught:
        run_pipeline(config(steps=1000, **changes), **factories(fake))
    assert mp.active_children() == []
    assert memfds() == set()
    return caught.value, time.time() - mark.stat().st_mtime


@pytest.mark.parametrize("worker", ROLES)
def test_worker_that_raises_is_named_with_its_traceback(tmp_path: Path, worker: str) -> None:
    error, seconds = fail(tmp_path, worker, "raise")
    assert isinstance(error, WorkerError)
    assert error.worker == worker
    assert error.worker_traceback is not None
    assert "ArithmeticError: the numbers went bad" in error.worker_traceback
    assert "pipeline_fakes.py" in str(error)
    assert seconds < SECONDS


def test_one_teacher_exception_leaks_a_permit_and_hangs_the_run(tmp_path: Path) -> None:
    """Bug of another implementation. Here the exception ends a run in sync mode too, at once."""
    error, seconds = fail(tmp_path, "teacher", "raise", mode="sync")
    assert isinstance(error, WorkerError)
    assert error.worker == "teacher"
    assert seconds < SECONDS


@pytest.mark.parametrize("worker", ROLES)
@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [("exit", 7, "exited with code 7"), ("kill", -9, "was killed by SIGKILL")],
)
def test_worker_death_goes_unnoticed(tmp_path: Path, worker: str, kind: str, code: int, text: str) -> None:
    """Bug of another implementation. Here a death is noticed, and says who and how."""
    error, seconds = fail(tmp_path, worker, kind)
    assert isinstance(error, WorkerError)
    assert (error.worker, error.exitcode) == (worker, code)
    assert f"worker '{worker}' {text}" in str(error)
    assert seconds < SECONDS


@pytest.mark.parametrize(
    ("worker", "debt"),
    [
        ("rollout-0", r"\d+ sequences|weights, version"),
        ("teacher", r"scores of \d slots"),
        ("learner", "optimizer step 4"),
    ],
)
def test_stall_names_the_stuck_side(tmp_path: Path, worker: str, debt: str) -> None:
    error, seconds = fail(tmp_path, worker, "hang", stall_timeout_s=1.0)
    assert isinstance(error, StallError)
    assert error.worker == worker
    assert f"worker '{worker}' is stuck" in str(error)
    assert re.search(debt, str(error))
    assert seconds < 1.0 + SECONDS


def test_long_decode_that_shows_progress_is_not_stuck() -> None:
    """No sequence finishes for longer than stall_timeout_s; the worker's heartbeat counts."""
    fake = Fake(slow_worker="rollout-0", slow_s=0.25)
    result = run_pipeline(config(steps=1, stall_timeout_s=1.0), **factories(fake))
    assert result.wall_seconds > 1.0


def test_engine_that_steps_and_never_finishes_is_named(tmp_path: Path) -> None:
    """Its heartbeats say that it steps, not that anything will come of it."""
    error, seconds = fail(tmp_path, "rollout-0", "endless", stall_timeout_s=1.0)
    assert isinstance(error, StallError)
    text = r"'rollout-0' is stuck: \d+ decode steps in .* s without finishing a sequence, it owes \d+ seq"
    assert re.search(text, str(error))
    assert seconds < 1.0 + SECONDS


def test_slow_callback_is_not_a_silent_worker() -> None:
    def on_step(metrics: dict[str, float]) -> None:
        if metrics["step"] == 2:
            time.sleep(1.6)

    fakes = factories(Fake(step_s=0.01, score_s=0.03))
    result = run_pipeline(config(steps=20, max_staleness=4, stall_timeout_s=1.0), **fakes, on_step=on_step)
    assert result.steps == 20


def test_learner_without_weights_is_named() -> None:
    with pytest.raises(WorkerError, match=r"'learner' has no weights to publish: its weight_spec\(\) is empty"):
        run_pipeline(config(), **factories(Fake(bare=True)))
    assert mp.active_children() == []


def test_second_interrupt_while_stopping_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_step(metrics: dict[str, float]) -> None:
        raise KeyboardInterrupt

    def stop(handles: Sequence[processes.WorkerHandle], *, gently: bool) -> None:
        with processes.interrupts_deferred():  # it comes while the workers are being stopped
            signal.raise_signal(signal.SIGINT)
            processes.stop_workers(handles, gently=gently)

    monkeypatch.setattr(supervisor, "stop_workers", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        run_pipeline(config(), **factories(Fake()), on_step=on_step)
    assert mp.active_children() == []
    assert memfds() == set()  # while the traceback still holds everything
    assert caught.value.__context__ is not None


@pytest.mark.parametrize("end", ["timeout", "interrupt"])
def test_save_that_is_cut_off_leaves_the_old_checkpoint_alone(tmp_path: Path, end: str) -> None:
    folder, mark = tmp_path / "run", tmp_path / "mark"
    folder.mkdir()
    (folder / "checkpoint").write_text("old")
    fakes = factories(Fake(save_s=3600, mark=str(mark)))
    patience = {"stall_timeout_s": 0.9} | ({"startup_timeout_s": 8.0} if end == "timeout" else {})

    def interrupt() -> None:
        while not mark.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    if end == "interrupt":
        threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(StallError if end == "timeout" else KeyboardInterrupt) as caught:
        run_pipeline(config(steps=2, **patience), **fakes, checkpoint=folder / "checkpoint")
    assert end == "interrupt" or "'learner' is stuck: silent for 8" in str(caught.value)
    assert mark.exists()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"checkpoint": "old"}


@pytest.mark.parametrize("worker", ROLES)
def test_failing_start_is_named(worker: str) -> None:
    with pytest.raises(WorkerError, match="OSError: no such model") as caught:
        run_pipeline(config(), **factories(Fake(faults={worker: "start"})))
    assert caught.value.worker == worker
    assert mp.active_children() == []


def test_slow_start_is_named() -> None:
    fakes = factories(Fake(faults={"teacher": "slow start"}))
    with pytest.raises(StallError, match=r"'teacher' is stuck: silent for .* it owes its start"):
        run_pipeline(config(startup_timeout_s=3.0), **fakes)
    assert mp.active_children() == []


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ([[1, 2]] * 3, "the prompts ended after 3"),
        (lambda uid: [1] * 5, "prompt 0 has 5 tokens, expected 1 to max_prompt_tokens=4"),
    ],
)
def test_bad_prompts_are_named(prompts: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run_pipeline(config(), **(factories(Fake()) | {"prompts": prompts}))
    assert mp.active_children() == []


def test_exception_in_a_callback_leaves_no_process() -> None:
    def on_step(metrics: dict[str, float]) -> None:
        raise LookupError("display is gone")

    with pytest.raises(LookupError, match="display is gone"):
        run_pipeline(config(), **factories(Fake()), on_step=on_step)
    assert mp.active_children() == []


def test_sigterm_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="the prompts ended"):
        run_pipeline(config(), **(factories(Fake()) | {"prompts": [prompt_of(0)]}))
    assert signal.getsignal(signal.SIGTERM) is before
