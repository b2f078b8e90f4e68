"""Worker processes as the supervisor sees them: start, talk, notice a death, stop for good."""

from __future__ import annotations

import multiprocessing as mp
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from asyncopd.pipeline.errors import WorkerError
from asyncopd.pipeline.messages import Failed, Stop
from asyncopd.pipeline.worker import WorkerArgs, run_worker

# A fork inherits locks that other threads hold, and CUDA does not survive one.
START_METHOD: Literal["spawn", "forkserver"] = "spawn"
TERMINATE_S = 2.0  # from SIGTERM to SIGKILL
LEAVE_S = 10.0  # from Stop to SIGTERM


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let SIGINT and SIGTERM take effect only when the block is left.

    SIGINT is blocked as well, because a process started inside inherits that: Ctrl-C in a terminal
    reaches it too, and it must not die of it before it can choose to ignore it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def pickle_factory(worker: str, factory: Callable[[], object]) -> bytes:
    """Pickle an engine factory; raises WorkerError naming the worker when it does not pickle."""
    try:
        return pickle.dumps(factory)
    except Exception as error:
        reason = f"cannot start, its factory does not pickle: {error}"
        raise WorkerError(worker, reason) from error


class WorkerHandle:
    """One worker process and this end of its pipe. Starts it.

    Args:
        name: shown to people, such as "rollout-0".
        loop: module-level function ``loop(context, engine)`` that serves the worker's commands.
        args: what else the worker is given.
    """

    def __init__(self, name: str, loop: Callable[[Any, Any], None], args: WorkerArgs) -> None:
        self.name = name
        self.ready = False
        self.contact = time.monotonic()  # last message either way, see also `forgive`
        context: Any = mp.get_context(START_METHOD)  # typeshed gives Process to its subclasses only
        self.conn, child = mp.Pipe(duplex=True)
        self.process: BaseProcess = context.Process(target=run_worker, args=(loop, child, args), name=name)
        self.process.start()
        child.close()  # the worker's death is seen as end of file only if no copy stays open here
        # Sends go through a thread: a worker that does not read must not block the supervisor,
        # which would then not notice that it is stuck.
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=_pump, args=(self._outbox, self.conn), daemon=True).start()

    def send(self, message: object) -> None:
        """Queue a message; never blocks. That the worker is gone shows at `messages`."""
        self.contact = time.monotonic()
        self._outbox.put(message)

    def forgive(self, seconds: float) -> None:
        """Do not count so many seconds as silence."""
        self.contact = min(time.monotonic(), self.contact + seconds)

    def messages(self) -> list[Any]:
        """What has come in.

        Raises:
            WorkerError: the worker reported a failure, or it is dead and has nothing left to say.
        """
        came: list[Any] = []
        try:
            while self.conn.poll():
                message = self.conn.recv()
                if isinstance(message, Failed):
                    raise WorkerError(self.name, "raised", worker_traceback=message.traceback)
                came.append(message)
        except (EOFError, OSError):
            if not came:
                raise self._death() from None
        if came:
            self.contact = time.monotonic()
        elif not self.process.is_alive():
            raise self._death()
        return came

    def has_news(self) -> bool:
        """Whether `messages` has something to say: words of the worker, or its death."""
        try:
            return self.conn.poll()
        except OSError:
            return True

    def _death(self) -> WorkerError:
        self.process.join(TERMINATE_S)
        code = self.process.exitcode
        if code is None:
            return WorkerError(self.name, "closed its pipe")
        if code < 0:
            return WorkerError(self.name, f"was killed by {_signal_name(-code)}", exitcode=code)
        return WorkerError(self.name, f"exited with code {code}", exitcode=code)


def start_tracker() -> None:
    """Start multiprocessing's helper process now: its start lifts signal masks."""
    resource_tracker.ensure_running()


def stop_workers(handles: Sequence[WorkerHandle], *, gently: bool) -> None:
    """Leave no process behind: ask (if ``gently``), then SIGTERM, then SIGKILL; bounded in time."""
    with interrupts_deferred():
        if gently:
            for handle in handles:
                handle.send(Stop())
            _join(handles, LEAVE_S)
        for handle in handles:
            handle.process.terminate()
        _join(handles, TERMINATE_S)
        for handle in handles:
            handle.process.kill()
        for handle in handles:
            handle.process.join()
            handle.send(None)  # ends the sending thread
            handle.conn.close()


def _join(handles: Sequence[WorkerHandle], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for handle in handles:
        handle.process.join(max(0.0, deadline - time.monotonic()))


def _pump(outbox: queue.SimpleQueue[object], conn: Connection) -> None:
    while (message := outbox.get()) is not None:
        try:
            conn.send(message)
        except OSError:  # the reader is gone, which the supervisor sees for itself
            return


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    hint = "; out of memory?" if number == signal.SIGKILL else ""
    return f"{name} (signal {number}{hint})"
