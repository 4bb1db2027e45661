"""The standing group: one start of Ray Train's workers for all trainings of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from small_task import Begun, Broken, ByteTask, Diverging, Killed, Slow
from test_ray_backend import CONFIG, assert_same, cluster, python_path, ray_folder, wait_for_step  # noqa: F401

from mobula.cluster.resources import WorkerResources
from mobula.cluster.spec import ClusterSpec, Platform, Train
from mobula.errors import TrainingError
from mobula.training import FitResult, Training, fit, fit_all, group, ray_backend
from mobula.training.group import Group
from mobula.training.loop import METRICS, Row
from mobula.training.ray_backend import Work

END_TO_END = [pytest.mark.end_to_end, pytest.mark.timeout(900)]


def train(directory: Path, task: ByteTask | None = None, **changes: Any) -> FitResult:
    return fit(task or ByteTask(), dataclasses.replace(CONFIG, **changes), directory, seed=3, name="test")


def workers_of(standing: Group) -> object:
    assert standing._workers is not None and standing._workers.standing
    return standing._workers


@pytest.fixture(scope="module")
def alone(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> list[FitResult]:  # noqa: F811
    """Two tasks whose workers started for them."""
    folder = tmp_path_factory.mktemp("alone")
    trainings = [
        Training(task, CONFIG, folder / str(i), 3, "test") for i, task in enumerate((ByteTask(), ByteTask(width=4)))
    ]
    return fit_all(trainings)


@pytest.fixture(scope="class")
def standing(alone: list[FitResult]) -> Iterator[Group]:
    """One group for all tests here; workers that an earlier test left are taken as they are."""
    with group() as made:
        yield made


class TestOnWorkers:
    """In order, on one group."""

    pytestmark = END_TO_END

    def test_trainings_on_a_group_end_as_each_alone(
        self, standing: Group, alone: list[FitResult], tmp_path: Path
    ) -> None:
        results = [train(tmp_path / "0"), train(tmp_path / "1", ByteTask(width=4)), train(tmp_path / "2")]
        for ours, theirs in zip(results, [*alone, alone[0]], strict=True):
            assert_same(ours, theirs)

    def test_a_training_begins_within_2_s_while_the_group_stands(self, standing: Group, tmp_path: Path) -> None:
        train(tmp_path / "first")
        waits = []
        for i in range(3):
            asked = time.time()
            train(tmp_path / str(i), Begun(begun=str(tmp_path / f"begun-{i}")))
            waits.append(float((tmp_path / f"begun-{i}").read_text()) - asked)
        print(f"seconds until a training began on standing workers: {[round(wait, 3) for wait in waits]}")
        assert max(waits) < 2

    def test_an_error_leaves_the_group_standing(self, standing: Group, alone: list[FitResult], tmp_path: Path) -> None:
        train(tmp_path / "before")
        before = workers_of(standing)
        with pytest.raises(TrainingError, match="the loss became nan at step 3"):
            train(tmp_path / "nan", Diverging())
        assert_same(train(tmp_path / "after"), alone[0])
        assert workers_of(standing) is before

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_error_of_the_progress_callback_ends_the_training(
        self, standing: Group, alone: list[FitResult], tmp_path: Path, workers: int
    ) -> None:
        """It reaches the caller, in this process and from workers, and the same training goes on when asked again."""

        def progress(row: Row) -> None:
            if row["step"] >= 2:
                raise ValueError("the disk of the progress is full")

        config = dataclasses.replace(CONFIG, workers=workers)
        with pytest.raises(ValueError, match="the disk of the progress is full"):
            fit(Slow(), config, tmp_path, seed=3, name="test", progress=progress)
        assert not (tmp_path / "result.json").exists()
        result = fit(Slow(), config, tmp_path, seed=3, name="test")
        if workers:
            assert_same(result, alone[0])

    def test_losses_count_for_the_training_that_had_them(
        self, standing: Group, alone: list[FitResult], tmp_path: Path
    ) -> None:
        """With max_failures=1 each of two trainings may lose a worker; a training before and one after lose none."""
        results = [train(tmp_path / "first", max_failures=1)]
        for name, kill in (("second", (1, 4)), ("third", (0, 3))):
            marks = tmp_path / f"kills-{name}"
            marks.mkdir()
            results.append(train(tmp_path / name, Killed(marks=str(marks), kills=(kill,)), max_failures=1))
            assert len(list(marks.iterdir())) == 1
        results.append(train(tmp_path / "fourth", max_failures=1))
        for result in results:
            assert_same(result, alone[0])

    def test_one_ranks_error_does_not_let_the_others_wait(
        self, standing: Group, alone: list[FitResult], tmp_path: Path
    ) -> None:
        with pytest.raises(TrainingError, match="rank 1 gives up"):
            train(tmp_path / "broken", Broken())
        assert_same(train(tmp_path / "after"), alone[0])

    def test_another_number_of_workers_starts_the_group_anew(self, standing: Group, tmp_path: Path) -> None:
        train(tmp_path / "two")
        before = workers_of(standing)
        train(tmp_path / "one", workers=1)
        assert workers_of(standing) is not before and standing._workers.resources.workers == 1

    def test_the_group_closes_soon(self, standing: Group, tmp_path: Path) -> None:
        train(tmp_path)
        started = time.monotonic()
        standing.close()
        assert time.monotonic() - started < 5
        assert standing._workers is None

    def test_an_interrupted_driver_ends_its_workers_soon(self, tmp_path: Path) -> None:
        script = tmp_path / "driver.py"
        script.write_text(DRIVER)
        with ray_folder() as folder:
            environment = {**os.environ, "PYTHONPATH": python_path(), "RAY_TMPDIR": folder}
            command = [sys.executable, "-X", "faulthandler", str(script), str(tmp_path / "run")]
            driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            wait_for_step(tmp_path / "run" / "metrics.jsonl", 2, driver)
            assert "KeyboardInterrupt" in interrupted(driver)


def interrupted(driver: subprocess.Popen[str]) -> str:
    """What a driver wrote to stderr that ended within 60 s of an interrupt.

    Python drops an interrupt that arrives while a finaliser runs; then people press the keys again.
    """
    for _ in range(2):
        driver.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return driver.communicate(timeout=60)[1]
    driver.send_signal(signal.SIGABRT)  # where it stands goes to stderr
    return f"still running after two interrupts: {driver.communicate()[1]}"


DRIVER = """
import sys
from pathlib import Path
from small_task import Slow
from test_group import group, train

if __name__ == "__main__":
    with group():
        train(Path(sys.argv[1]), Slow(), steps=1000)
"""


class Asked(Exception):
    """Carries what would have been asked of Ray Train."""


def asked_of_ray(monkeypatch: pytest.MonkeyPatch, directory: Path, spec: ClusterSpec | None) -> dict[str, Any]:
    """The arguments of the TorchTrainer that ``fit`` makes; no Ray is started."""
    import ray.train.torch

    def trainer(loop: object, **arguments: Any) -> None:
        raise Asked(arguments)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
    for name in ("connect", "check_resources", "make_room"):
        monkeypatch.setattr(import_module("mobula.training.group"), name, lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(ray_backend, "_start_queue", lambda world: world)
    with group(spec, "method-1a2b"), pytest.raises(Asked) as asked:
        fit(
            ByteTask(),
            dataclasses.replace(CONFIG, workers=None, micro_batch=None),
            directory,
            seed=3,
            name="training",
            cluster=spec,
        )
    return asked.value.args[0]


@pytest.mark.parametrize(("gpus", "backend"), [(1.0, "nccl"), (0.0, "gloo")])
def test_what_is_asked_of_ray_is_what_cluster_yaml_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: float, backend: str
) -> None:
    requested = Train(workers=4, cpus_per_worker=3, gpus_per_worker=gpus)
    asked = asked_of_ray(monkeypatch, tmp_path, ClusterSpec(Path("cluster.yaml"), {}, Platform(train=requested), {}))
    scaling, run = asked["scaling_config"], asked["run_config"]
    assert scaling.num_workers == 4 and scaling.use_gpu is (gpus > 0)
    assert scaling.resources_per_worker == ({"CPU": 3, "GPU": 1} if gpus else {"CPU": 3})
    assert asked["torch_config"].backend == backend
    assert run.name.startswith("method-1a2b-"), "the dashboard shows whose workers these are, not their first training"
    assert run.worker_runtime_env["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert run.failure_config.controller_failure_limit >= 0, "an unbounded number of attempts waits for ever"


def test_without_a_cluster_of_its_own_a_training_takes_the_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = ClusterSpec(Path("cluster.yaml"), {}, Platform(train=Train(workers=2)), {})
    with group(spec) as made, group() as inner:
        assert inner is made
        asked = asked_of_ray(monkeypatch, tmp_path, None)
    assert asked["scaling_config"].num_workers == 2


class Stub:
    """Workers that have nothing to do."""

    def __init__(self, gpus: float = 0.0) -> None:
        self.resources = WorkerResources(2, gpus=gpus)
        self.standing, self.closed, self.aborted = True, 0, 0

    def train(self, work: Work, watch: Callable[[], None]) -> None:
        watch()

    def close(self) -> None:
        self.closed += 1

    def abort(self) -> None:
        self.aborted += 1


def test_a_group_rests_only_with_gpus() -> None:
    for gpus, closed in ((0.0, 0), (1.0, 1)):
        made, stub = Group(), Stub(gpus)
        made._workers = stub
        made.rest()
        assert stub.closed == closed


def test_workers_of_stage_3_end_with_their_training(tmp_path: Path) -> None:
    """Memory of a stage-3 engine is freed with its process alone; other stages leave the workers standing."""
    for zero, closed in ((2, 0), (3, 1)):
        made, stub = Group(), Stub()
        made._workers = stub
        config = dataclasses.replace(CONFIG, zero=zero)
        made.train(Work(ByteTask(), config, tmp_path, 3), "test", stub.resources, lambda row: None)
        assert stub.closed == closed


def test_workers_in_use_do_not_rest(tmp_path: Path) -> None:
    """A progress callback that wants a GPU does not wait for the training that waits for it."""
    made, stub = Group(), Stub(gpus=1.0)
    made._workers = stub

    def train(work: Work, watch: Callable[[], None]) -> None:
        (tmp_path / METRICS).write_text('{"step": 1}\n')
        watch()

    stub.train = train
    made.train(Work(ByteTask(), CONFIG, tmp_path, 3), "test", stub.resources, lambda row: made.rest())
    assert stub.closed == 0
    made.rest()
    assert stub.closed == 1
