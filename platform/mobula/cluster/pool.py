"""A pool of Ray actors that work on shards of items, or this process in their place."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mobula.cluster.connect import check_resources, connect
from mobula.cluster.resources import WorkerResources, holding, make_room
from mobula.cluster.spec import ClusterSpec, Train
from mobula.errors import ClusterError, MobulaError

Row = dict[str, Any]
Shard = tuple[int, Sequence[Row], int]  # number, items, seed
log = logging.getLogger(__name__)


class Worker(Protocol):
    """Turns items into rows, on an actor: picklable, and opens what is slow to open on first use.

    Rows may depend on the items and the seed alone, never on what the worker did before.
    """

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """The rows that come of ``items``; both are JSON. ``seed`` is that of the shard."""
        ...


class Pool:
    """Works on shards in this process, one after another."""

    def process(self, worker: Worker, shards: Sequence[Shard]) -> Iterator[tuple[int, Sequence[Row]]]:
        """Yields (number, rows) of shards as they are finished, in any order."""
        for number, items, seed in shards:
            yield number, worker.process(items, seed)

    def map(self, job: Callable[[Any, int], object], names: Sequence[Any], seeds: Sequence[int]) -> None:
        """Call ``job(name, seed)`` for every seed of every name, in any order; what it returns is not looked at.

        A job that goes to a Ray actor is sent as a copy, so it must be one that can be pickled (a bound method of a
        small dataclass will do) and must leave its results on disk.
        """
        items: list[Row] = [{"name": name, "seed": seed} for name in names for seed in seeds]
        shards = [(number, [item], 0) for number, item in enumerate(items)]
        what = getattr(job, "__name__", "job")
        for done, (number, _) in enumerate(self.process(_Job(job), shards), 1):
            log.info(
                "%s: %s, seed %d (%d of %d)",
                what,
                names[number // len(seeds)],
                seeds[number % len(seeds)],
                done,
                len(items),
            )


class ActorPool(Pool):
    """Works on Ray actors, which live as long as the pool. A lost one is replaced, and its shard given out anew.

    Raises:
        ClusterError: actors were lost more than ``max_failures`` times.
    """

    def __init__(self, resources: WorkerResources, max_failures: int) -> None:
        self.resources = resources
        self.max_failures = max_failures
        self.actors: list[Any] = []

    def process(self, worker: Worker, shards: Sequence[Shard]) -> Iterator[tuple[int, Sequence[Row]]]:
        """As in this process, several at a time."""
        import ray

        shared = [ray.put(worker)]  # in a list, so that an actor fetches it once and not with every shard
        missing = min(self.resources.workers, len(shards)) - len(self.actors)
        if missing > 0:
            make_room(replace(self.resources, workers=missing), self)
            self.actors += [self._start() for _ in range(missing)]
        return self._process(shared, list(reversed(shards)))

    def rest(self) -> None:
        """End actors that hold GPUs; an actor that does nothing holds no CPU."""
        if self.resources.gpus:
            self.close()

    def close(self) -> None:
        """End the actors."""
        import ray

        while self.actors:
            ray.kill(self.actors.pop())

    def _process(self, shared: list[Any], waiting: list[Shard]) -> Iterator[tuple[int, Sequence[Row]]]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        running: dict[Any, tuple[Shard, Any]] = {}
        idle, lost = list(self.actors), 0
        while waiting or running:
            while waiting and idle:
                shard, actor = waiting.pop(), idle.pop()
                running[actor.process.remote(shared, shard[1], shard[2])] = (shard, actor)
            (ready,), _ = ray.wait(list(running), num_returns=1)
            shard, actor = running.pop(ready)
            try:
                rows = ray.get(ready)
            except RayTaskError as error:
                if isinstance(error.cause, MobulaError):
                    raise error.cause from None  # its message is for a person; Ray's is the actor's traceback
                raise
            except RayActorError as error:
                lost += 1
                if lost > self.max_failures:
                    reason = f"{lost} actors were lost, the last on shard {shard[0]}: {' '.join(str(error).split())}"
                    raise ClusterError(reason[:400]) from error
                log.warning("an actor was lost on shard %d; another one takes it", shard[0])
                self.actors.remove(actor)
                self.actors.append(self._start())
                waiting.append(shard)
                idle.append(self.actors[-1])
                continue
            idle.append(actor)
            yield shard[0], rows

    def _start(self) -> Any:
        import ray

        # Actors ask for no CPU, not even to start: training workers, which rest while actors work, may hold them all.
        needs = {"num_gpus": self.resources.gpus} if self.resources.gpus else {}
        return ray.remote(_Actor).options(num_cpus=0, scheduling_strategy="SPREAD", **needs).remote()


@contextlib.contextmanager
def pool(actors: int | None, cluster: ClusterSpec | None, *, max_failures: int = 2) -> Iterator[Pool]:
    """The pool within the block: Ray actors, which start when they are first needed, or this process.

    ``actors``: how many; 0: this process; None: as many as the cluster's training has workers.

    Raises:
        ClusterError: the cluster cannot give the actors what they need.
    """
    train = cluster.platform.train if cluster else Train(workers=0)
    count = train.workers if actors is None else actors
    if count == 0:
        yield Pool()
        return
    with connect():
        resources = WorkerResources(count, train.cpus_per_worker, train.gpus_per_worker)
        check_resources(resources)
        found = ActorPool(resources, max_failures)
        try:
            with holding(found):
                yield found
        finally:
            found.close()


class _Actor:
    """Keeps the worker that it was given last, with all that this one has opened."""

    def __init__(self) -> None:
        self.shared: Any = None
        self.worker: Worker | None = None

    def process(self, shared: list[Any], items: Sequence[Row], seed: int) -> Sequence[Row]:
        import ray

        if self.worker is None or shared[0] != self.shared:
            self.shared, self.worker = shared[0], ray.get(shared[0])
        return self.worker.process(items, seed)


@dataclass
class _Job:
    """A function of a name and a seed as a worker."""

    job: Callable[[Any, int], object]

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        for item in items:
            self.job(item["name"], item["seed"])
        return []
