"""What every worker counts."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from asyncopd.pipeline.messages import StageStats
from asyncopd.pipeline.worker import Stopwatch


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_time_of_work_is_counted_without_the_waiting() -> None:
    context: Any = SimpleNamespace(stats=StageStats(), started=0.0)
    with Stopwatch(context, "wait_s"):
        spin(0.02)
    assert context.stats.cpu_s == 0.0
    for _ in range(2):
        with Stopwatch(context, "busy_s"):
            spin(0.02)
            time.sleep(0.1)
    assert 0.04 <= context.stats.cpu_s < 0.2
    assert context.stats.busy_s >= context.stats.cpu_s + 0.15
