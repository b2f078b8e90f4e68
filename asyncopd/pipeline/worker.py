"""What every worker does: build its engine, obey its pipe, never outlive the supervisor."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from asyncopd.pipeline.messages import Attach, Failed, StageStats, Start
from asyncopd.pipeline.shared import SharedBytes, TensorSpec
from asyncopd.pipeline.slots import SlotArena, SlotSpec
from asyncopd.pipeline.weights import WeightSegment


@dataclass(slots=True)
class WorkerArgs:
    """What a worker is given at its birth, besides its pipe."""

    factory: bytes  # pickled; unpickled in here, so that a failure to is reported like any other
    slot_spec: SlotSpec
    slot_memory: SharedBytes
    weight_memory: SharedBytes
    threads: int
    heartbeat_s: float


class Context:
    """A worker's end of the pipe, its shared memory and its counters."""

    def __init__(self, conn: Connection, args: WorkerArgs) -> None:
        self.conn = conn
        self.slots = SlotArena(args.slot_spec, args.slot_memory.tensor())
        self.stats = StageStats()
        self.heartbeat_s = args.heartbeat_s
        self._weight_memory = args.weight_memory
        self._weights: WeightSegment | None = None
        self.started = 0.0

    @property
    def weights(self) -> WeightSegment:
        assert self._weights is not None, "weights used before Attach"
        return self._weights

    def send(self, message: object) -> None:
        self.conn.send(message)

    def take(self, *, block: bool) -> list[Any]:
        """The commands in the pipe, at least one if ``block``; handles Attach and Start."""
        commands: list[Any] = []
        while (block and not commands) or self.conn.poll():
            command = self.conn.recv()
            if isinstance(command, Attach):
                self._attach(command.weights)
            elif isinstance(command, Start):
                self.stats = StageStats()
                self.started = time.perf_counter()
            else:
                commands.append(command)
        return commands

    def _attach(self, specs: list[TensorSpec]) -> None:
        self._weights = WeightSegment(specs, self._weight_memory.tensor())


def run_worker(loop: Callable[[Context, Any], None], conn: Connection, args: WorkerArgs) -> None:
    """Entry point of a worker process: ``loop(context, engine)`` until it is told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's business
    _die_with_parent()
    try:
        torch.set_num_threads(args.threads)
        factory = pickle.loads(args.factory)
        loop(Context(conn, args), factory())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        if not _report(conn):  # else an engine's own
            os._exit(1)
    except BaseException:
        _report(conn)
        raise SystemExit(1) from None


def _report(conn: Connection) -> bool:
    """Send the traceback being handled; False if nobody is there to read it."""
    try:
        conn.send(Failed(traceback.format_exc()))
    except OSError:
        return False
    return True


def _die_with_parent() -> None:
    """Leave at once when the supervisor dies, in the middle of a long kernel too."""
    parent = mp.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


class Stopwatch:
    """Adds the wall time inside a ``with`` block to one field of the stats.

    Of work (``busy_s``) also the CPU time, to ``cpu_s``: with fewer cores than busy workers, wall time
    alone would count the waiting for a core as work.
    """

    __slots__ = ("_context", "_cpu_since", "_field", "_since")

    def __init__(self, context: Context, field: str) -> None:
        self._context = context
        self._field = field
        self._since = 0.0
        self._cpu_since = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()
        self._cpu_since = time.process_time()

    def __exit__(self, *_: object) -> None:
        # Start may have come inside the block: the stats are new then, and count from there.
        stats = self._context.stats
        elapsed = time.perf_counter() - max(self._since, self._context.started)
        setattr(stats, self._field, getattr(stats, self._field) + elapsed)
        if self._field == "busy_s":  # never around Start
            stats.cpu_s += time.process_time() - self._cpu_since
