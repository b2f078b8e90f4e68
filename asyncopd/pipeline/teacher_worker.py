"""The teacher's worker: score one slot after the other."""

from __future__ import annotations

from asyncopd.pipeline.messages import Ready, Score, SlotScored, Stop
from asyncopd.pipeline.protocols import Scorer
from asyncopd.pipeline.worker import Context, Stopwatch


def teacher_loop(context: Context, scorer: Scorer) -> None:
    """Serve until told to stop."""
    context.send(Ready())
    while True:
        with Stopwatch(context, "wait_s"):
            commands = context.take(block=True)
        for command in commands:
            match command:
                case Score(slot=index):
                    slot = context.slots.slot(index)
                    with Stopwatch(context, "busy_s"):
                        scorer.score(slot)
                    context.stats.tokens += slot.num_response_tokens
                    context.send(SlotScored(index, context.stats))
                case Stop():
                    return
