"""The supervisor itself is interrupted or killed: no process and no shared memory is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest
from pipeline_fakes import memfds

SECONDS = 5.0  # "within seconds", on a busy machine


def marked(marker: str) -> list[int]:
    """Process ids whose environment holds the marker; the resource tracker's included."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "environ").read_bytes():
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z":
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


def shared_memory(pids: Iterable[int | str]) -> set[int]:
    """What these processes have open of the pipeline's shared memory."""
    found: set[int] = set()
    for pid in pids:
        with suppress(OSError):  # gone, or not ours to look at
            found |= memfds(pid)
    return found


def everybody() -> list[str]:
    return [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def interrupt(process: subprocess.Popen[str]) -> None:
    """Like Ctrl-C in a terminal: every process of the group gets it. Twice: users are impatient."""
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)


ENDINGS: list[tuple[str, str, Callable[[subprocess.Popen[str]], None]]] = [
    ("SIGINT", "step", interrupt),
    ("SIGINT in start-up", "started", interrupt),
    ("SIGTERM", "step", lambda process: process.terminate()),
    ("SIGKILL", "step", lambda process: process.kill()),
    ("SIGKILL in decode", "long-decode", lambda process: process.kill()),
]


@pytest.mark.parametrize(("when", "end"), [e[1:] for e in ENDINGS], ids=[e[0] for e in ENDINGS])
def test_end_of_the_supervisor_leaves_nothing(when: str, end: Callable[[subprocess.Popen[str]], None]) -> None:
    marker = f"pipeline-{uuid.uuid4()}"
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("pipeline_script.py")), when],
        env=os.environ | {"MARKER": marker, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    wanted = "started" if when == "started" else "step 5\n"
    while wanted not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    if when == "long-decode":  # the steps end when the rollout worker falls asleep
        time.sleep(1.0)
    if when == "started":
        time.sleep(0.5)  # its children are importing
    assert len(marked(marker)) >= 4
    memory = shared_memory(marked(marker))
    assert len(memory) == 2  # slots and weights
    end(process)
    process.stdout.close()
    begin = time.monotonic()
    process.wait(timeout=20)
    while marked(marker) and time.monotonic() - begin < SECONDS + 5:
        time.sleep(0.05)
    assert marked(marker) == []
    assert time.monotonic() - begin < SECONDS
    assert not memory & shared_memory(everybody())
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    if end is interrupt:
        assert process.returncode in (-signal.SIGINT, 130)
        assert errors.count("Traceback") <= 2  # the supervisor's own, none of a worker
    assert "leaked" not in errors
