"""The supervisor itself is interrupted or killed: no process and no shared memory is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

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


def shared_names() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


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
    marker, names = f"pipeline-{uuid.uuid4()}", shared_names()
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
    end(process)
    process.stdout.close()
    begin = time.monotonic()
    process.wait(timeout=20)
    while marked(marker) and time.monotonic() - begin < SECONDS + 5:
        time.sleep(0.05)
    assert marked(marker) == []
    assert time.monotonic() - begin < SECONDS
    assert shared_names() <= names
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    if end is interrupt:
        assert process.returncode in (-signal.SIGINT, 130)
        assert errors.count("Traceback") <= 2  # the supervisor's own, none of a worker
    assert "leaked" not in errors
