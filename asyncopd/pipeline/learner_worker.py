"""The learner's worker: train, publish weights, write the checkpoint."""

from __future__ import annotations

from pathlib import Path

from asyncopd.pipeline.checkpoint import save_atomically
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
                    save_atomically(learner.save, Path(path))
                    context.send(Saved())
                case Stop():
                    return


def _step(context: Context, learner: Learner, command: Step) -> None:
    batch = [(context.slots.slot(index), indices) for index, indices in command.parts]
    for slot, indices in batch:
        lengths = slot.response_lengths
        context.stats.tokens += int(lengths[indices].sum())
    with Stopwatch(context, "busy_s"):
        metrics = learner.step(batch)
    # Here, because a tensor would come out of the pipe as a tensor, on the device that it was on.
    numbers = {name: float(value) for name, value in metrics.items()}
    context.send(StepDone(numbers, context.stats))
    if command.publish_buffer is not None:
        _publish(context, learner, command.publish_buffer, command.version)


def _publish(context: Context, learner: Learner, buffer: int, version: int) -> None:
    context.weights.write(buffer, learner.named_weights())
    context.send(Published(buffer, version))
