"""Reach Ray: attach to the cluster this process belongs to, or start one on this machine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from mobula import environment
from mobula.cluster.resources import WorkerResources, fitting
from mobula.errors import ClusterError

# Open blocks that share the Ray of the first of them.
_blocks = 0


@contextlib.contextmanager
def connect(cpus: int | None = None) -> Iterator[None]:
    """Have Ray within the block.

    Nothing happens where Ray is connected already (an outer block, a Tune trial). With RAY_ADDRESS set, as inside
    a job, the process attaches to that cluster. Otherwise a Ray of this machine's resources runs until the block
    ends, and every block that was entered in it; ``cpus`` overrides its number of CPUs, which Ray uses for
    bookkeeping alone.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    global _blocks
    environment.driver_environment()
    import ray

    if ray.is_initialized() and not _blocks:
        yield
        return
    if not ray.is_initialized():
        _start(cpus)
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        if not _blocks:
            ray.shutdown()


def _start(cpus: int | None) -> None:
    import ray

    address = environment.ray_address()
    environment.secure_token_file()
    try:
        if address is None:
            ray.init(address="local", num_cpus=cpus, logging_level=logging.WARNING, log_to_driver=False)
        else:
            ray.init(logging_level=logging.WARNING, log_to_driver=False)
    except Exception as error:  # A node that does not come up within 30 s is a bare Exception (Ray 2.60).
        reason = " ".join(str(error).split())[:300]
        what = f"cannot reach the Ray cluster at {address}" if address else "cannot start Ray on this machine"
        raise ClusterError(f"{what}: {reason}") from error
    environment.secure_token_file(fresh=True)


def check_resources(request: WorkerResources) -> None:
    """Compare what training asks for with the nodes that are alive; Ray would wait for the missing part for ever.

    Raises:
        ClusterError: naming the resource, the request and what the cluster has.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, each in request.bundle().items():
        total = sum(node.get(resource, 0.0) for node in nodes)
        largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        if fitting(nodes, resource, each) < request.workers:
            raise ClusterError(
                f"{resource}: {request.workers} workers x {each:g} = {request.workers * each:g} asked for, but the "
                f"cluster has {total:g} on {len(nodes)} node(s), {largest:g} on the largest: lower training.workers or "
                "metadata.train in cluster.yaml, or add nodes"
            )
