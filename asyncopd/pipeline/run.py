"""The entry point of the pipeline."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from asyncopd.pipeline.config import PipelineConfig
from asyncopd.pipeline.metrics import RunResult
from asyncopd.pipeline.protocols import LearnerFactory, RolloutFactory, ScorerFactory
from asyncopd.pipeline.schedule import NextPrompt
from asyncopd.pipeline.supervisor import OnStep, OnTick, Supervisor

Prompts = NextPrompt | Iterable[list[int]]


def run_pipeline(
    config: PipelineConfig,
    *,
    rollout: RolloutFactory,
    teacher: ScorerFactory,
    learner: LearnerFactory,
    prompts: Prompts,
    on_step: OnStep | None = None,
    on_tick: OnTick | None = None,
    checkpoint: str | Path | None = None,
) -> RunResult:
    """Train for ``config.steps`` optimizer steps in worker processes; returns when all have ended.

    The calling script needs the ``if __name__ == "__main__":`` guard of spawned processes.

    Args:
        config: how to schedule.
        rollout, teacher, learner: picklable callables that build each engine inside its worker.
        prompts: ``prompts(uid) -> token ids`` for uid 0, 1, ...; or an iterable of token ids.
        on_step: called after each optimizer step with its metrics, a flat dict of numbers.
        on_tick: called about four times a second with a `PipelineStatus`.
        checkpoint: where the learner saves after the last step; written aside and renamed.

    Raises:
        WorkerError: a worker raised or died; names it and carries its traceback.
        StallError: a worker that owes work was silent, or decoded without finishing a sequence, for too
            long; names it and what it owes.
        ValueError: a prompt is empty or too long, or the prompts ended before the run.
        MemoryError: the shared memory would not fit.
        KeyboardInterrupt: on SIGINT and SIGTERM. Whatever is raised, no process is left.
    """
    supervisor = Supervisor(config, _prompt_source(prompts, config.max_prompt_tokens))
    supervisor.on_step = on_step
    supervisor.on_tick = on_tick
    with _sigterm_as_interrupt():
        return supervisor.run(rollout, teacher, learner, checkpoint)


def _prompt_source(prompts: Prompts, longest: int) -> NextPrompt:
    """``prompts`` as a function of the uid that checks what it returns."""
    iterator = None if callable(prompts) else iter(prompts)

    def next_prompt(uid: int) -> list[int]:
        if iterator is None:
            assert callable(prompts)
            prompt = prompts(uid)
        else:
            try:
                prompt = next(iterator)
            except StopIteration:
                raise ValueError(f"the prompts ended after {uid}; the run needs more") from None
        if not 1 <= len(prompt) <= longest:
            raise ValueError(f"prompt {uid} has {len(prompt)} tokens, expected 1 to max_prompt_tokens={longest}")
        return prompt

    return next_prompt


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a run like Ctrl-C does; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
