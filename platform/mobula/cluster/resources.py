"""What training asks of a cluster, and who of this process holds GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class WorkerResources:
    """A number of equal training workers and what each of them needs."""

    workers: int
    cpus: float = 1.0
    gpus: float = 0.0

    def bundle(self) -> dict[str, float]:
        """What one worker needs, as Ray names it."""
        return {name: value for name, value in (("CPU", self.cpus), ("GPU", self.gpus)) if value > 0}


def fitting(nodes: Iterable[Mapping[str, float]], resource: str, each: float) -> int:
    """How many workers that need ``each`` of a resource fit on the nodes; a worker does not straddle nodes."""
    return sum(int(node.get(resource, 0.0) / each + 1e-9) for node in nodes)


class Holder(Protocol):
    """Keeps Ray actors with GPUs between its uses."""

    def rest(self) -> None:
        """Hand back what is not in use."""
        ...


_holders: list[Holder] = []


@contextlib.contextmanager
def holding(holder: Holder) -> Iterator[None]:
    """Within the block ``holder`` may be asked to rest."""
    _holders.append(holder)
    try:
        yield
    finally:
        _holders.remove(holder)


def make_room(request: WorkerResources, asking: Holder) -> None:
    """Have the other holders of this process rest, unless enough GPUs are free: samplers and trainers of a run
    alternate, and where the cluster has GPUs for both, both keep theirs."""
    if not request.gpus:
        return
    from ray._private.state import available_resources_per_node

    if fitting(available_resources_per_node().values(), "GPU", request.gpus) >= request.workers:
        return
    for holder in list(_holders):
        if holder is not asking:
            holder.rest()
