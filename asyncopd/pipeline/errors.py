"""Everything that can end a pipeline run early."""

from __future__ import annotations


class PipelineError(RuntimeError):
    """The run cannot go on. Every worker has been stopped when this reaches the caller."""


class WorkerError(PipelineError):
    """A worker raised, exited or was killed.

    Attributes:
        worker: its name, such as ``"teacher"`` or ``"rollout-1"``.
        worker_traceback: the traceback text of what it raised; None when it died without a word.
        exitcode: its exit status, negative for a signal; None when it reported the failure itself.
    """

    def __init__(
        self,
        worker: str,
        reason: str,
        *,
        worker_traceback: str | None = None,
        exitcode: int | None = None,
    ) -> None:
        text = f"worker {worker!r} {reason}"
        super().__init__(f"{text}\n\n{worker_traceback}" if worker_traceback else text)
        self.worker = worker
        self.worker_traceback = worker_traceback
        self.exitcode = exitcode


class StallError(PipelineError):
    """A worker that owes work was silent, or decoded without finishing anything, beyond its time limit.

    Attributes:
        worker: the name of the stuck worker.
    """

    def __init__(self, worker: str, message: str) -> None:
        super().__init__(message)
        self.worker = worker
