"""The real start method: each worker a fresh interpreter."""

from __future__ import annotations

import multiprocessing as mp
from pathlib import Path

import pytest
from pipeline_fakes import Fake, config, factories

from asyncopd.pipeline import WorkerError, processes, run_pipeline


def test_run_completes_with_spawned_workers(tmp_path: Path) -> None:
    assert processes.START_METHOD == "spawn"
    result = run_pipeline(config(), **factories(Fake()), checkpoint=tmp_path / "final")
    assert result.consumed_sequences == 48
    assert (tmp_path / "final").read_text() == "6"
    assert mp.active_children() == []


def test_factory_that_does_not_unpickle_in_the_worker_is_named() -> None:
    fakes = factories(Fake()) | {"teacher": Unreadable()}
    with pytest.raises(WorkerError, match="ZeroDivisionError: cannot be read back") as caught:
        run_pipeline(config(), **fakes)
    assert caught.value.worker == "teacher"
    assert mp.active_children() == []


class Unreadable:
    def __getstate__(self) -> dict[str, int]:
        return {"any": 1}

    def __setstate__(self, state: dict[str, int]) -> None:
        raise ZeroDivisionError("cannot be read back")

    def __call__(self) -> None: ...
