"""When a mode lets work begin. One class a mode; the scheduler asks, and keeps the books.

Staleness is counted in optimizer steps: the learner's version L when a sequence is consumed, minus
the oldest version among its tokens. Sequences are consumed in batches of B. One that is granted
while n are outstanding (granted before it and not consumed) is, first in first out, consumed at
version L + n // B. Written with weights v it is then L + n // B - v steps stale, which is at most
eta exactly when

    n < (eta + 1 - (L - v)) * B
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True, frozen=True)
class Books:
    """What a mode may look at.

    Args:
        batch_size: B.
        version: L, optimizer steps done.
        outstanding: sequences granted and neither consumed nor refused.
        decoding: those of them that no rollout worker has handed in yet.
        loaded: per rollout worker the version that it has acknowledged.
    """

    batch_size: int
    version: int
    outstanding: int
    decoding: int
    loaded: tuple[int, ...]


class Pacing(Protocol):
    """The rules of one mode."""

    def cap(self, batch_size: int, workers: int, useful: int) -> int:
        """Most sequences at one of ``workers`` rollout workers that keeps ``useful`` ones busy."""

    def room(self, books: Books, worker: int) -> int:
        """How many more prompts could be granted to ``worker`` now; 0 or less means none."""

    def may_score(self, books: Books) -> bool:
        """Whether the teacher may take filled slots now."""


@dataclass(slots=True, frozen=True)
class SyncPacing:
    """Rollout, score, train, sync weights, each only when the one before it is complete."""

    def cap(self, batch_size: int, workers: int, useful: int) -> int:
        return -(-batch_size // workers)  # the batch is dealt out at once, in equal shares

    def room(self, books: Books, worker: int) -> int:
        synced = all(version == books.version for version in books.loaded)
        return books.batch_size - books.outstanding if synced else 0

    def may_score(self, books: Books) -> bool:
        return books.decoding == 0


@dataclass(slots=True, frozen=True)
class AsyncPacing:
    """Every stage goes on as long as nothing can expire in first-in first-out order."""

    max_staleness: int  # eta

    def cap(self, batch_size: int, workers: int, useful: int) -> int:
        # The share keeps one worker from taking all of what pacing allows while others idle.
        share = -(-batch_size * (self.max_staleness + 1) // workers)
        return min(share, useful)

    def room(self, books: Books, worker: int) -> int:
        lag = books.version - books.loaded[worker]
        return (self.max_staleness + 1 - lag) * books.batch_size - books.outstanding

    def may_score(self, books: Books) -> bool:
        return True
