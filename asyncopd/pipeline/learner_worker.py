"""The learner's worker: train, publish weights, write the checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from asyncopd.pipeline.messages import Publish, Published, Ready, Save, Saved, Step, StepDone, Stop
from asyncopd.pipeline.protocols import Learner
from asyncopd.pipeline.worker import Context, Stopwatch


def learner_loop(context: Context, learner: Learner) -> None:
    """Serve until told to stop."""
    context.send(Ready(weights=learner.weight_spec()))
    while True:
        with Stopwatch(context, "wait_s"):
            commands = context.take(block=True)
        for command in commands:
            match command:
                case Step():
                    _step(context, learner, command)
                case Publish(buffer=buffer, version=version):
                    _publish(context, learner, buffer, version)
                case Save(path=path):
                    save_atomically(learner, Path(path))
                    context.send(Saved(path))
                case Stop():
                    return


def _step(context: Context, learner: Learner, command: Step) -> None:
    batch = [(context.slots.slot(index), indices) for index, indices in command.parts]
    for slot, indices in batch:
        lengths = slot.response_lengths
        context.stats.tokens += int(lengths[indices].sum())
    with Stopwatch(context, "busy_s"):
        metrics = learner.step(batch)
    context.send(StepDone(metrics, context.stats))
    if command.publish_buffer is not None:
        _publish(context, learner, command.publish_buffer, command.version)


def _publish(context: Context, learner: Learner, buffer: int, version: int) -> None:
    context.weights.write(buffer, learner.named_weights())
    context.send(Published(buffer, version))


def save_atomically(learner: Learner, path: Path) -> None:
    """Save to a sibling of ``path``, then rename: ``path`` is never half a checkpoint."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    for leftover in (partial, old):
        _remove(leftover)
    try:
        learner.save(str(partial))
    except BaseException:
        _remove(partial)
        raise
    if path.is_dir():  # rename() replaces a file, but not a folder with something in it
        os.replace(path, old)
    os.replace(partial, path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
