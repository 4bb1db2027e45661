"""Dynamic batching: groups, fairness, cancellation, and results that do not depend on the batch."""

import asyncio
import threading
import time

import pytest

from mobula.cancellation import raise_if_cancelled
from mobula.serving.batching import Batcher


def run(scenario, compute, size=8):
    async def main():
        batcher = Batcher(compute, size)
        try:
            return await scenario(batcher)
        finally:
            batcher.close()

    return asyncio.run(main())


class Recorder:
    def __init__(self, seconds=0.0):
        self.seconds, self.batches, self.threads = seconds, [], set()

    def __call__(self, group, items):
        self.batches.append((group, list(items)))
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        return [item * 10 for item in items]


def test_requests_that_arrive_during_a_batch_form_the_next_one():
    compute = Recorder(0.02)

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.submit("a", i) for i in range(6)))

    assert run(scenario, compute, size=4) == [0, 10, 20, 30, 40, 50]
    assert [len(items) for _, items in compute.batches] == [4, 2]
    assert len(compute.threads) == 1 and threading.get_ident() not in compute.threads


def test_batches_hold_one_budget_and_groups_take_turns():
    compute = Recorder()

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.submit(g, i) for i, g in enumerate("ababaa")))

    run(scenario, compute, size=2)
    assert compute.batches == [("a", [0, 2]), ("b", [1, 3]), ("a", [4, 5])]


def test_failure_of_one_request_is_its_own():
    def compute(group, items):
        if 3 in items:
            raise ValueError("three")
        return items

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.submit("a", i) for i in range(5)), return_exceptions=True)

    results = run(scenario, compute)
    assert results[:3] == [0, 1, 2] and isinstance(results[3], ValueError) and results[4] == 4


def test_s5_waiting_request_that_is_cancelled_is_not_computed():
    compute = Recorder(0.05)

    async def scenario(batcher):
        first = asyncio.create_task(batcher.submit("a", 1))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(batcher.submit("a", 2))
        await asyncio.sleep(0)
        second.cancel()
        assert await first == 10
        return await batcher.submit("a", 3)

    assert run(scenario, compute) == 30
    assert [items for _, items in compute.batches] == [[1], [3]]


def test_s5_batch_stops_when_its_last_caller_has_left_and_not_before():
    steps = []

    def compute(group, items):
        for step in range(100):
            raise_if_cancelled()
            steps.append(group)
            time.sleep(0.01)
            if group == "short" and step == 10:
                break
        return items

    async def scenario(batcher):
        tasks = [asyncio.create_task(batcher.submit(g, i)) for i, g in enumerate(["short", "short", "long"])]
        await asyncio.sleep(0.03)
        tasks[0].cancel()
        assert await tasks[1] == 1
        await asyncio.sleep(0.03)
        tasks[2].cancel()
        await asyncio.sleep(0.05)
        return await batcher.submit("short", 7)

    assert run(scenario, compute) == 7
    assert steps.count("short") == 22 and 1 <= steps.count("long") < 20


def test_event_loop_stays_free_while_the_model_computes():
    async def scenario(batcher):
        task = asyncio.create_task(batcher.submit("a", 1))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        return ticks

    assert run(scenario, Recorder(0.2)) > 5


def test_iteration_shares_the_thread_and_closes_its_source():
    compute, closed = Recorder(), threading.Event()

    def source():
        try:
            for i in range(100):
                compute.threads.add(threading.get_ident())
                yield i
        finally:
            closed.set()

    async def scenario(batcher):
        seen = []
        items = batcher.iterate(source)
        async for item in items:
            seen.append(item)
            await batcher.submit("a", item)
            if item == 2:
                break
        await items.aclose()
        await asyncio.to_thread(closed.wait, 2)
        return seen

    assert run(scenario, compute) == [0, 1, 2]
    assert closed.is_set() and len(compute.threads) == 1


def test_iteration_passes_on_errors():
    def source():
        yield 1
        raise ValueError("broken")

    async def scenario(batcher):
        return [item async for item in batcher.iterate(source)]

    with pytest.raises(ValueError, match="broken"):
        run(scenario, Recorder())
