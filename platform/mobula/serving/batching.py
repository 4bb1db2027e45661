"""Dynamic batching that groups requests by budget.

Requests that arrive while a batch is computed form the next ones, so an idle server adds no waiting time and a
busy one fills its batches. Why not ``serve.batch``: it has one queue, so a request for one denoising step would
wait for the longest of its batch; it goes on computing for callers that have left; and it exists only inside a
replica, while the same app must run under plain uvicorn to be compared.

All work on the model runs in one thread: the event loop stays free, and the model needs no locks.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mobula.cancellation import Cancelled, cancellable

T = TypeVar("T")
_END = object()


class Batcher:
    """Runs ``compute(group, items) -> results`` on batches of items that share a group.

    The group whose first item has waited longest goes next. Results do not depend on the batch: if a batch
    fails, its items are computed one by one, so each caller gets the outcome of its own item.
    """

    def __init__(
        self,
        compute: Callable[[Any, list[Any]], Sequence[Any]],
        max_batch_size: int,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.compute, self.max_batch_size, self.observe = compute, max_batch_size, observe
        self.waiting: dict[Hashable, deque[tuple[Any, asyncio.Future]]] = {}
        self.runner: asyncio.Task | None = None
        self._thread: ThreadPoolExecutor | None = None

    @property
    def thread(self) -> ThreadPoolExecutor:
        """The model's thread; a new one after :meth:`close`, since an app may be started again."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        return self._thread

    async def submit(self, group: Hashable, item: Any) -> Any:
        """The result of ``item``. If the caller is cancelled, its item is dropped, or its batch stopped."""
        future = asyncio.get_running_loop().create_future()
        # A group keeps the place that its first item gave it: dictionaries keep the order of insertion.
        self.waiting.setdefault(group, deque()).append((item, future))
        if self.runner is None or self.runner.done():
            self.runner = asyncio.create_task(self._drain())
        return await future

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in the model's thread."""
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        return await loop.run_in_executor(self.thread, lambda: context.run(function, *arguments))

    async def iterate(self, start: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
        """The items of an iterator whose every step runs in the model's thread, between batches.

        When the consumer stops, so does the iterator.
        """
        iterator = await self.call(start)
        try:
            while (item := await self.call(next, iterator, _END)) is not _END:
                yield item  # type: ignore[misc]
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                # Queued behind a step that may still run; nobody waits for it.
                self.thread.submit(close)

    def close(self) -> None:
        """Drop what waits; the thread ends after its current step."""
        if self.runner is not None:
            self.runner.cancel()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self.runner = self._thread = None
        self.waiting.clear()

    async def _drain(self) -> None:
        while self.waiting:
            group, batch = self._next_batch()
            if batch:
                self.observe(len(batch))
                await self._run(group, batch)

    def _next_batch(self) -> tuple[Hashable, list[tuple[Any, asyncio.Future]]]:
        group = next(iter(self.waiting))
        queue = self.waiting.pop(group)
        batch: list[tuple[Any, asyncio.Future]] = []
        while queue and len(batch) < self.max_batch_size:
            item, future = queue.popleft()
            if not future.done():
                batch.append((item, future))
        if queue:
            # The rest lines up behind the other groups: no group can starve another.
            self.waiting[group] = queue
        return group, batch

    async def _run(self, group: Hashable, batch: list[tuple[Any, asyncio.Future]]) -> None:
        items = [item for item, _ in batch]
        futures = [future for _, future in batch]
        try:
            results = await self.call(self._compute, group, items, futures)
        except Cancelled:
            return
        except Exception as error:
            if len(batch) == 1:
                _settle(futures[0], error=error)
                return
            for single in batch:
                if not single[1].done():
                    await self._run(group, [single])
            return
        for future, result in zip(futures, results, strict=True):
            _settle(future, result)

    def _compute(self, group: Hashable, items: list[Any], futures: list[asyncio.Future]) -> Sequence[Any]:
        # Reading `done()` from this thread is safe; a future is only ever settled on the event loop.
        with cancellable(lambda: all(f.done() for f in futures)):
            return self.compute(group, items)


def _settle(future: asyncio.Future, result: Any = None, error: Exception | None = None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
