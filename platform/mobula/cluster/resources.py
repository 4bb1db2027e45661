"""What training asks of a cluster, and who of this process holds GPUs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


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


def make_room(request: WorkerResources, asking: Holder | None, node: str | None = None) -> None:
    """Have the other holders of this process rest, unless enough GPUs are free: samplers and trainers of a run
    alternate, and where the cluster has GPUs for both, both keep theirs.

    ``node``: Ray's id of the node on which they must be free, if only one will do.
    """
    if not request.gpus:
        return
    import torch
    from ray._private.state import available_resources_per_node

    # Memory that models of this process have left is kept for it by PyTorch; Ray knows nothing of it.
    gc.collect()
    torch.cuda.empty_cache()
    free = available_resources_per_node()
    nodes = free.values() if node is None else [free.get(node, {})]
    if fitting(nodes, "GPU", request.gpus) >= request.workers:
        return
    for holder in list(_holders):
        if holder is not asking:
            holder.rest()


def process_device() -> torch.device:
    """The device of what this process computes itself: its first GPU, or the CPU where it has none.

    A driver takes its GPU without Ray, which may have given the same one to workers: holders rest unless all GPUs of
    the driver's node are free.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    if _holders:
        _make_room_for_this_process()
    return torch.device("cuda")


def _make_room_for_this_process() -> None:
    import ray
    from ray._private.state import total_resources_per_node

    context = ray.get_runtime_context()
    if context.get_accelerator_ids()["GPU"]:
        return  # Ray gave this process a GPU of its own
    node = context.get_node_id()
    make_room(WorkerResources(1, gpus=total_resources_per_node()[node].get("GPU", 0.0)), None, node)
