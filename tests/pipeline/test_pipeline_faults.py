"""What goes wrong ends the run within seconds, is named, and leaves nothing behind."""

from __future__ import annotations

import multiprocessing as mp
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from pipeline_fakes import Fake, config, factories, prompt_of

from asyncopd.pipeline import StallError, WorkerError, run_pipeline

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
