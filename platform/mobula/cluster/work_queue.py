"""A queue of work that a whole group of workers does together, one piece after another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any


class WorkQueue:
    """Gives every one of ``world`` workers the same pieces of work in the same order, and collects how each ended.

    It is a Ray actor of the driver's: what waits here costs no processor time, and no collective of the workers is
    open while they have nothing to do. Work comes as a list with an object reference, which the queue never opens.
    """

    def __init__(self, world: int, grace_s: float) -> None:
        self.world = world
        self.grace_s = grace_s
        self.work: dict[int, list[Any]] = {}
        self.outcomes: dict[int, dict[int, bytes | None]] = {}
        self.closed = False
        self.changed = asyncio.Condition()

    async def run(self, number: int, work: list[Any]) -> dict[int, bytes | None]:
        """Have ``work`` done; by rank, None or the error that was reported.

        Ranks are missing if they are still at it ``grace_s`` after another one's error: they wait for a rank that
        has given up, and have to be ended from outside.
        """
        self.work[number], self.outcomes[number] = work, {}
        await self._notify()
        await self._wait(lambda: self._complete(number) or any(self.outcomes[number].values()))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wait(lambda: self._complete(number)), self.grace_s)
        del self.work[number]
        return self.outcomes.pop(number)

    async def take(self, after: int) -> tuple[int, list[Any]] | None:
        """The first unfinished work with a number above ``after``, as soon as there is some; None: none will come."""
        await self._wait(lambda: self.closed or any(number > after for number in self.work))
        return next(((number, work) for number, work in sorted(self.work.items()) if number > after), None)

    async def report(self, number: int, rank: int, error: bytes | None) -> None:
        """A rank has ended its part of the work, with an error or without."""
        if number in self.outcomes:
            self.outcomes[number][rank] = error
            await self._notify()

    async def close(self) -> None:
        """No further work will come."""
        self.closed = True
        await self._notify()

    async def stand(self) -> None:
        """Never returns: who waits for it learns of the queue's end by an error."""
        await asyncio.Event().wait()

    def _complete(self, number: int) -> bool:
        return len(self.outcomes[number]) == self.world

    async def _wait(self, condition: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(condition)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()
