"""pytest-benchmark, fed with the times of interleaved rounds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gates import THREADS
from bench.measure import Timing
from bench.report import print_report
from bench.results import load


class Replay:
    """A timer that gives recorded durations.

    pytest-benchmark times one function after the other, and a ratio of times that were taken minutes apart is one of
    two machines. Rounds that go round all providers are timed by bench.measure; this hands them to pytest-benchmark,
    whose statistics, files and comparisons between runs then are those of the rounds.
    """

    def __init__(self) -> None:
        self._readings: list[float] = []

    def load(self, timing: Timing) -> None:
        self._readings = [reading for seconds in timing.seconds for reading in (0.0, seconds)]

    def __call__(self) -> float:
        return self._readings.pop(0)


REPLAY = Replay()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY))


RESULTS_FILE = pytest.StashKey[Path]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of what was measured, below the tests."""
    path = config.stash.get(RESULTS_FILE, None)
    if path is not None and path.exists():
        print_report(load(path))
        terminalreporter.write_line(f"results: {path}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="file of JSON lines; bench/results/MACHINE-DATE.jsonl if left out")


@pytest.fixture
def report_timing(benchmark: Any) -> Callable[[Timing], None]:
    """Give pytest-benchmark the rounds of the provider that the test is about."""

    def report(timing: Timing) -> None:
        REPLAY.load(timing)
        benchmark.pedantic(lambda: None, rounds=len(timing.seconds))

    return report


@pytest.fixture(autouse=True, scope="session")
def threads() -> None:
    """Figures are for two threads, whatever the machine has: those of two machines can then be compared."""
    torch.set_num_threads(THREADS)
