"""The training loop on Ray Train's workers; the one module that imports ``ray.train``.

Ray places the workers, joins them into a process group and replaces lost ones. What survives an attempt is ours
alone: the directory's checkpoints (see :mod:`mobula.training.checkpoints`). Ray's own record of a run is
thrown away with every call, because under a known name Ray "resumes" a finished run by returning its old result.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mobula import environment
from mobula.cluster.connect import check_resources, connect
from mobula.cluster.resources import WorkerResources
from mobula.errors import ClusterError, MobulaError, TrainingError
from mobula.training import loop
from mobula.training.config import TrainingConfig
from mobula.training.task import Task

SCRATCH = "ray"
FOLLOW_S = 0.5
# Attempts to place the workers, each of which lasts as long as the start timeout.
PLACEMENTS = 1


@dataclass(frozen=True)
class Work:
    """A training, as a worker needs to know it."""

    task: Task
    config: TrainingConfig
    directory: Path
    seed: int
    trial: bool = False


def train(
    works: Sequence[Work], name: str, resources: WorkerResources, progress: Sequence[Callable[[loop.Row], None]]
) -> None:
    """Run :func:`mobula.training.loop.train` for each of ``works`` on the workers that ``resources`` asks for.

    ``progress`` has one function for each.

    Raises:
        ClusterError: the cluster cannot give the workers, or a node does not see the directories.
        TrainingError, ArtifactError, RunConflict: as the loop does; or workers were lost too often.
    """
    with connect():
        check_resources(resources)
        trainer = _trainer(works, name, resources)
        try:
            with contextlib.ExitStack() as following:
                for work, report in zip(works, progress, strict=True):
                    following.enter_context(_following(work.directory / loop.METRICS, report))
                error = _outcome(trainer)
        finally:
            shutil.rmtree(works[0].directory / SCRATCH, ignore_errors=True)
    if error is not None:
        raise error


def _trainer(works: Sequence[Work], name: str, resources: WorkerResources) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = resources.gpus > 0
    variables = environment.worker_environment(gpu, threads=int(resources.cpus))
    return TorchTrainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config={"works": works},
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=gpu, resources_per_worker=resources.bundle()
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(works[0].directory / SCRATCH),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=sum(work.config.max_failures for work in works), controller_failure_limit=PLACEMENTS
            ),
            worker_runtime_env={"env_vars": variables},
        ),
    )


def _outcome(trainer: Any) -> MobulaError | None:
    """Train; the error that ended it, if one did."""
    from ray.exceptions import RayError
    from ray.train import ControllerError, WorkerGroupError

    try:
        return trainer.fit().return_value
    except ControllerError as error:
        return ClusterError(f"the cluster did not start the workers: {_line(error.controller_failure)}")
    except RayError as error:
        return ClusterError(f"Ray Train's controller failed: {_line(error)}")
    except WorkerGroupError as error:
        rank, cause = min(error.worker_failures.items())
        return TrainingError(
            f"training stopped after worker failures on ranks {sorted(error.worker_failures)}, more than "
            f"training.max_failures allows; rank {rank}: {_line(cause)}; the same command goes on from the last "
            "checkpoint"
        )


def _worker(settings: dict[str, Any]) -> MobulaError | None:
    """One worker's trainings. An error that a restart would only repeat is returned: Ray retries what is raised."""
    import ray.train
    import ray.train.torch

    works: Sequence[Work] = settings["works"]
    try:
        _require_shared(works[0].directory)
        for work in _unfinished(works):
            device = ray.train.torch.get_device()
            loop.train(work.task, work.config, work.directory, work.seed, device, _report, work.trial)
    except loop.RankFailure:
        raise
    except MobulaError as error:
        return error
    return None


def _unfinished(works: Sequence[Work]) -> list[Work]:
    """What an earlier attempt has left to do. Rank 0 decides, so that all ranks train the same."""
    left: list[Any] = [[not (work.directory / loop.RESULT).is_file() for work in works]]
    dist.broadcast_object_list(left, src=0)
    return [work for work, is_left in zip(works, left[0], strict=True) if is_left]


def _report(row: loop.Row) -> None:
    """Show an evaluation in Ray's dashboard, and to a Tune trial around this training.

    Every rank has the rows of evaluations; ``ray.train.report`` waits for all of them.
    """
    import ray.train

    if "dev" in row:
        ray.train.report({"step": row["step"], **row["dev"]})


def _require_shared(directory: Path) -> None:
    """Raise on every rank unless all of them see the driver's directory."""
    import ray

    seen: list[str | None] = [None] * dist.get_world_size()
    address = ray.util.get_node_ip_address()
    dist.all_gather_object(seen, None if (directory / SCRATCH).is_dir() else address)
    blind = sorted({address for address in seen if address is not None})
    if blind:
        raise ClusterError(
            f"{directory}: not visible on node(s) {', '.join(blind)}; put the run on storage that all nodes share "
            "(metadata.storage in cluster.yaml)"
        )


@contextlib.contextmanager
def _following(path: Path, progress: Callable[[loop.Row], None]) -> Iterator[None]:
    """Call ``progress`` with the rows that the workers append to the metrics file during the block."""
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(path, progress, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _follow(path: Path, progress: Callable[[loop.Row], None], done: threading.Event) -> None:
    # Rows are known by what they say of which step: after a worker was lost the file is cut and grows again.
    shown = {_kind(row) for row in _rows(path)}
    finished = False
    while not finished:
        finished = done.wait(FOLLOW_S)
        for row in _rows(path):
            if _kind(row) not in shown:
                shown.add(_kind(row))
                progress(row)


def _rows(path: Path) -> list[loop.Row]:
    return loop.read_metrics(path) if path.is_file() else []


def _kind(row: loop.Row) -> tuple[int, bool]:
    return row["step"], "dev" in row


def _line(error: BaseException) -> str:
    """The last line of an error's text, which names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
