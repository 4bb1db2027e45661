"""The standing group of a run: Ray Train's workers, started once, take one training after another."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from mobula.cluster.connect import check_resources, connect
from mobula.cluster.resources import WorkerResources, holding, make_room
from mobula.cluster.spec import ClusterSpec
from mobula.errors import TrainingError
from mobula.training import loop
from mobula.training.ray_backend import Work, Workers, WorkersLost

log = logging.getLogger(__name__)


class Group:
    """Trains on workers that start with the first training and stand until the group is closed.

    They are started anew for a training that wants others, and after a loss. ``cluster`` is that of trainings which
    name none; ``name`` is the group's in Ray's dashboard.
    """

    def __init__(self, cluster: ClusterSpec | None = None, name: str = "training") -> None:
        self.cluster = cluster
        self.name = name
        self._workers: Workers | None = None
        self._held = contextlib.ExitStack()
        self._connected = False
        self._turn = threading.Lock()

    def train(self, work: Work, name: str, resources: WorkerResources, progress: Callable[[loop.Row], None]) -> None:
        """Run :func:`mobula.training.loop.train` on the workers that ``resources`` asks for.

        ``progress`` is called with every row of metrics. What it raises ends the training, and the workers with it.

        Raises:
            ClusterError: the cluster cannot give the workers, or a node does not see the directory.
            TrainingError, ArtifactError, RunConflict: as the loop does; or workers were lost too often.
        """
        follow = _Follower(work.directory / loop.METRICS, progress)
        with self._turn:
            losses = 0
            while not (work.directory / loop.RESULT).is_file():
                try:
                    error = self._standing(resources).train(work, follow)
                except WorkersLost as lost:
                    follow()
                    losses += not lost.preempted
                    if losses > work.config.max_failures:
                        raise TrainingError(
                            f"training stopped after {lost}, more than training.max_failures allows; {lost.cause}; "
                            "the same command goes on from the last checkpoint"
                        ) from None
                    log.warning("%s: %s (%s); new workers go on from the last checkpoint", name, lost, lost.cause)
                    continue
                except BaseException:
                    self._abort()
                    raise
                if work.config.zero == 3:
                    # DeepSpeed 0.19 lets go of nothing that an engine of stage 3 held: only a process's end frees it.
                    self._close_workers()
                follow()
                if error is not None:
                    raise error
                return

    def rest(self) -> None:
        """End idle workers that hold GPUs; the next training starts others."""
        if not self._turn.acquire(blocking=False):
            return  # a training's progress callback asks: its workers are in use
        try:
            if self._workers is not None and self._workers.resources.gpus:
                self._close_workers()
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        try:
            self._close_workers()
        finally:
            self._held.close()

    def _standing(self, resources: WorkerResources) -> Workers:
        if self._workers is not None and self._workers.standing and self._workers.resources == resources:
            return self._workers
        self._close_workers()
        if not self._connected:
            self._held.enter_context(connect())
            self._held.enter_context(holding(self))
            self._connected = True
        check_resources(resources)
        make_room(resources, self)
        self._workers = Workers(resources, self.name)
        return self._workers

    def _close_workers(self) -> None:
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def _abort(self) -> None:
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.abort()


_open: list[Group] = []


@contextlib.contextmanager
def group(cluster: ClusterSpec | None = None, name: str = "training") -> Iterator[Group]:
    """The group that all trainings of this process within the block share, however often they are asked for.

    ``name``: what Ray's dashboard shows, such as the run's id. Within another such block it is the same group, under
    that block's name. Nothing starts before a training wants workers.
    """
    if _open:
        yield _open[0]
        return
    _open.append(Group(cluster, name))
    try:
        yield _open[0]
    finally:
        _open.pop().close()


class _Follower:
    """Called now and then, calls ``progress`` with the rows that were added to a metrics file since."""

    def __init__(self, path: Path, progress: Callable[[loop.Row], None]) -> None:
        self.path, self.progress = path, progress
        # Rows are known by what they say of which step: after a worker was lost the file is cut and grows again.
        self.shown = {_kind(row) for row in _rows(path)}

    def __call__(self) -> None:
        for row in _rows(self.path):
            if _kind(row) not in self.shown:
                self.shown.add(_kind(row))
                self.progress(row)


def _rows(path: Path) -> list[loop.Row]:
    return loop.read_metrics(path) if path.is_file() else []


def _kind(row: loop.Row) -> tuple[int, bool]:
    return row["step"], "dev" in row
