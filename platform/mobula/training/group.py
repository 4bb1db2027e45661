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

FOLLOW_S = 0.5
log = logging.getLogger(__name__)


class Group:
    """Trains on workers that start with the first training and stand until the group is closed.

    They are started anew for a training that wants others, and after a loss. ``cluster`` is that of trainings which
    name none.
    """

    def __init__(self, cluster: ClusterSpec | None = None) -> None:
        self.cluster = cluster
        self._workers: Workers | None = None
        self._held = contextlib.ExitStack()
        self._connected = False
        self._turn = threading.Lock()

    def train(self, work: Work, name: str, resources: WorkerResources, progress: Callable[[loop.Row], None]) -> None:
        """Run :func:`mobula.training.loop.train` on the workers that ``resources`` asks for.

        Raises:
            ClusterError: the cluster cannot give the workers, or a node does not see the directory.
            TrainingError, ArtifactError, RunConflict: as the loop does; or workers were lost too often.
        """
        with self._turn, _following(work.directory / loop.METRICS, progress):
            losses = 0
            while not (work.directory / loop.RESULT).is_file():
                try:
                    error = self._standing(name, resources).train(work)
                except WorkersLost as lost:
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
                if error is not None:
                    raise error
                return

    def rest(self) -> None:
        """End workers that hold GPUs; the next training starts others."""
        with self._turn:
            if self._workers is not None and self._workers.resources.gpus:
                self._close_workers()

    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        try:
            self._close_workers()
        finally:
            self._held.close()

    def _standing(self, name: str, resources: WorkerResources) -> Workers:
        if self._workers is not None and self._workers.standing and self._workers.resources == resources:
            return self._workers
        self._close_workers()
        if not self._connected:
            self._held.enter_context(connect())
            self._held.enter_context(holding(self))
            self._connected = True
        check_resources(resources)
        make_room(resources, self)
        self._workers = Workers(resources, name)
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
def group(cluster: ClusterSpec | None = None) -> Iterator[Group]:
    """The group that all trainings of this process within the block share, however often they are asked for.

    Within another such block it is the same group. Nothing starts before a training wants workers.
    """
    if _open:
        yield _open[0]
        return
    _open.append(Group(cluster))
    try:
        yield _open[0]
    finally:
        _open.pop().close()


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
