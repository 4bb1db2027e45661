"""The training loop on Ray Train's workers; the one module that imports ``ray.train``.

Ray places the workers and joins them into a process group. What survives a lost worker is ours alone: the
directory's checkpoints (see :mod:`mobula.training.checkpoints`). Ray's own record of a run is thrown away, because
under a known name Ray "resumes" a finished run by returning its old result.
"""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mobula import environment
from mobula.cluster.resources import WorkerResources
from mobula.cluster.work_queue import WorkQueue
from mobula.errors import ClusterError, MobulaError
from mobula.training import loop
from mobula.training.config import TrainingConfig
from mobula.training.task import Task

# How often the driver looks at metrics and whether the workers still stand, while it waits for a training.
WATCH_S = 0.5
# Workers that were told to close end by themselves within this time, or are ended.
CLOSE_S = 4.0
# Ranks end a training that fails together, or they wait for one that has given up.
GRACE_S = 15.0
# Further attempts to place the workers, each of which lasts as long as the start timeout.
PLACEMENTS = 1


@dataclass(frozen=True)
class Work:
    """A training, as a worker needs to know it."""

    task: Task
    config: TrainingConfig
    directory: Path
    seed: int
    trial: bool = False


class WorkersLost(Exception):
    """Workers ended before the training did; ``preempted`` if the cluster took their node away."""

    def __init__(self, what: str, cause: str, preempted: bool) -> None:
        super().__init__(what)
        self.cause = cause
        self.preempted = preempted


class Workers:
    """Ray Train's workers, started once; they take trainings until they are closed or one of them is lost.

    The trainer runs in a thread of the driver's. Ray replaces nobody (``max_failures=0``): which training a loss
    counts for, and whether there is another attempt, is for :class:`mobula.training.group.Group` to say.
    """

    def __init__(self, resources: WorkerResources, name: str) -> None:
        self.resources = resources
        self._queue = _start_queue(resources.workers)
        self._storage = tempfile.TemporaryDirectory(prefix="mobula-ray-train-", ignore_cleanup_errors=True)
        self._trainer = _trainer(self._queue, name, resources, Path(self._storage.name))
        self._error: BaseException | None = None
        self._aborted = False
        self._number = 0
        self._thread = threading.Thread(target=self._run, name="ray-train", daemon=True)
        self._thread.start()

    @property
    def standing(self) -> bool:
        """Whether they can be given work; they may still be starting."""
        return self._thread.is_alive() and not self._aborted

    def train(self, work: Work, watch: Callable[[], None]) -> MobulaError | None:
        """Run :func:`mobula.training.loop.train` on all workers; the error that ended it, if one did.

        ``watch`` is called every now and then meanwhile; what it raises is raised here, and the workers go on.

        Raises:
            WorkersLost: workers were killed, or raised what another attempt may mend.
            ClusterError: the cluster cannot start them.
        """
        import ray
        from ray.exceptions import RayActorError

        self._number += 1
        outcome = self._queue.run.remote(self._number, [ray.put(work)])
        while not ray.wait([outcome], timeout=WATCH_S)[0]:
            watch()
            if not self.standing:
                raise self._end()
        try:
            errors = ray.get(outcome)
        except RayActorError:
            self._thread.join()  # without their queue the workers end
            raise self._end() from None
        if not self.standing:
            raise self._end()
        if len(errors) < self.resources.workers:
            self.abort()
        found = [error for _, error in sorted(errors.items()) if error is not None]
        return ray.cloudpickle.loads(found[0]) if found else None

    def close(self) -> None:
        """End idle workers."""
        if self.standing:
            self._queue.close.remote()
            self._thread.join(CLOSE_S)
        self.abort()

    def abort(self) -> None:
        """End the workers, whatever they do: they end with their queue."""
        import ray

        self._aborted = True
        ray.kill(self._queue)
        self._thread.join(CLOSE_S)
        self._storage.cleanup()

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._error = error

    def _end(self) -> WorkersLost | ClusterError:
        """What the trainer's end means."""
        from ray.exceptions import RayError
        from ray.train import ControllerError, WorkerGroupError
        from ray.train.v2.api.exceptions import PreemptionError

        error = self._error
        if isinstance(error, WorkerGroupError):
            failures = error.worker_failures
            # A rank that died is the cause; the others fail because they miss it.
            rank, cause = min(failures.items(), key=lambda item: (not isinstance(item[1], RayError), item[0]))
            preempted = any(getattr(failure, "preempted", False) for failure in failures.values())
            return WorkersLost(
                f"worker failures on ranks {sorted(failures)}", f"rank {rank}: {_line(cause)}", preempted
            )
        if isinstance(error, PreemptionError):
            return WorkersLost("a node was taken away", _line(error), preempted=True)
        if isinstance(error, ControllerError):
            return ClusterError(f"the cluster did not start the workers: {_line(error.controller_failure)}")
        return ClusterError(f"Ray Train's controller failed: {_line(error) if error else 'it ended'}")


def _start_queue(world: int) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(WorkQueue).options(num_cpus=0, scheduling_strategy=here).remote(world, GRACE_S)


def _trainer(queue: Any, name: str, resources: WorkerResources, storage: Path) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = resources.gpus > 0
    variables = environment.worker_environment(gpu, threads=int(resources.cpus))
    return TorchTrainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config={"queue": queue},
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=gpu, resources_per_worker=resources.bundle()
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            # Only the controller writes there, which runs on the driver's node.
            storage_path=str(storage),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=0, max_preemption_failures=0, controller_failure_limit=PLACEMENTS
            ),
            worker_runtime_env={"env_vars": variables},
        ),
    )


def _worker(settings: dict[str, Any]) -> None:
    """One worker's trainings, one after another, until the queue is closed."""
    import ray
    import ray.train.torch

    queue, number = settings["queue"], 0
    threading.Thread(target=_end_with, args=(queue,), daemon=True).start()
    device = ray.train.torch.get_device()
    while (taken := ray.get(queue.take.remote(number))) is not None:
        number, (reference,) = taken
        error = _train(ray.get(reference), device)
        del taken, reference
        _release(device)
        ray.get(queue.report.remote(number, dist.get_rank(), error))


def _end_with(queue: Any) -> None:
    """End this process when the queue ends: with its driver, or because the driver does not want to wait."""
    import ray

    try:
        ray.get(queue.stand.remote())
    finally:
        os._exit(1)


def _train(work: Work, device: torch.device) -> bytes | None:
    """An error that another attempt would only repeat is returned, pickled: what is raised ends the workers."""
    import ray

    try:
        _require_shared(work.directory)
        loop.train(work.task, work.config, work.directory, work.seed, device, _silent, work.trial)
    except loop.RankFailure:
        raise
    except MobulaError as error:
        return ray.cloudpickle.dumps(error)
    return None


def _release(device: torch.device) -> None:
    """Leave the next training the memory of the last one, whose engine and model refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _require_shared(directory: Path) -> None:
    """Raise on every rank unless all of them see the driver's directory."""
    import ray

    seen: list[str | None] = [None] * dist.get_world_size()
    address = ray.util.get_node_ip_address()
    dist.all_gather_object(seen, None if directory.is_dir() else address)
    blind = sorted({address for address in seen if address is not None})
    if blind:
        raise ClusterError(
            f"{directory}: not visible on node(s) {', '.join(blind)}; put the run on storage that all nodes share "
            "(metadata.storage in cluster.yaml)"
        )


def _silent(row: loop.Row) -> None:
    """The driver follows the metrics file."""


def _line(error: BaseException) -> str:
    """The last line of an error's text, which names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
