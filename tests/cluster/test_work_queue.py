"""The queue of a group of workers, without Ray: its methods are plain coroutines."""

from __future__ import annotations

import asyncio

from mobula.cluster.work_queue import WorkQueue


async def worker(queue: WorkQueue, rank: int, seen: list, errors: dict[str, bytes]) -> None:
    number = 0
    while (taken := await queue.take(number)) is not None:
        number, (work,) = taken
        seen.append((rank, work))
        await queue.report(number, rank, errors.get(work))


def test_every_rank_takes_every_work_in_order_and_ends_with_the_queue() -> None:
    async def scenario() -> list:
        queue, seen = WorkQueue(2, grace_s=5), []
        ranks = [asyncio.create_task(worker(queue, rank, seen, {"b": b"error"})) for rank in (0, 1)]
        outcomes = [await queue.run(number, [work]) for number, work in enumerate("abc", 1)]
        assert outcomes == [{0: None, 1: None}, {0: b"error", 1: b"error"}, {0: None, 1: None}]
        await queue.close()
        await asyncio.wait_for(asyncio.gather(*ranks), 5)
        return seen

    seen = asyncio.run(scenario())
    for rank in (0, 1):
        assert [work for number, work in seen if number == rank] == ["a", "b", "c"]


def test_workers_that_start_again_take_what_is_unfinished() -> None:
    async def scenario() -> None:
        queue = WorkQueue(1, grace_s=5)
        first = asyncio.create_task(queue.run(1, ["a"]))
        assert await queue.take(0) == (1, ["a"])
        assert await queue.take(0) == (1, ["a"])
        await queue.report(1, 0, None)
        await first
        second = asyncio.create_task(queue.run(2, ["b"]))
        assert await queue.take(0) == (2, ["b"])
        await queue.report(2, 0, None)
        await second

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_an_error_of_one_rank_is_known_though_the_others_never_report() -> None:
    async def scenario() -> dict[int, bytes | None]:
        queue = WorkQueue(3, grace_s=0.05)
        outcome = asyncio.create_task(queue.run(1, ["a"]))
        await queue.take(0)
        await queue.report(1, 1, b"error")
        return await asyncio.wait_for(outcome, 5)

    assert asyncio.run(scenario()) == {1: b"error"}
