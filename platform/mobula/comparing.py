"""Every arm of a comparison with every seed, several at a time.

Arms of a method are trained and measured apart from one another: each by a function of its name and a seed that leaves
its results on disk and, called again, finds them there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mobula import alternation
from mobula.alternation import AlternationConfig, Pool, Row
from mobula.cluster.spec import ClusterSpec

log = logging.getLogger(__name__)
Job = Callable[[str, int], object]


@dataclass(frozen=True)
class Crew:
    """Who does the jobs."""

    pool: Pool

    def each(self, job: Job, names: Sequence[str], seeds: Sequence[int]) -> None:
        """Call ``job(name, seed)`` for every seed of every name, in any order; what it returns is not looked at.

        A job that goes to a Ray actor is sent as a copy, so it must be one that can be pickled (a bound method of a
        small dataclass will do) and must leave its results on disk.
        """
        items: list[Row] = [{"name": name, "seed": seed} for name in names for seed in seeds]
        shards = [(shard, [item], 0) for shard, item in enumerate(items)]
        what = getattr(job, "__name__", "job")
        for done, (shard, _) in enumerate(self.pool.process(_Worker(job), shards), 1):
            log.info("%s: %s, seed %d (%d of %d)", what, *items[shard].values(), done, len(items))


@contextlib.contextmanager
def crew(parallel: int, cluster: ClusterSpec | None) -> Iterator[Crew]:
    """Who does jobs within the block: ``parallel`` Ray actors, or this process if that is 1.

    Raises:
        ClusterError: the cluster cannot give the actors what they need.
    """
    with alternation.workers(AlternationConfig(actors=parallel if parallel > 1 else 0), cluster) as pool:
        yield Crew(pool)


@dataclass
class _Worker:
    """Does jobs, wherever it is."""

    job: Job

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        for item in items:
            self.job(item["name"], item["seed"])
        return []
