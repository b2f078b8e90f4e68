"""Makes the helper modules here importable, in workers too (they get sys.path); quick starts."""

from __future__ import annotations

import multiprocessing as mp
import sys
from pathlib import Path

import pytest

from asyncopd.pipeline import processes

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers from a server that has imported torch once: 0.2 s in place of seconds a run.

    Nothing else changes: each is a process of its own, given the same arguments in the same way.
    test_pipeline_spawn.py and test_pipeline_endings.py keep to the real start method.
    """
    mp.set_forkserver_preload(["torch", "asyncopd.pipeline.supervisor"])
    monkeypatch.setattr(processes, "START_METHOD", "forkserver")
