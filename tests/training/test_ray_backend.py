"""Training on Ray Train's workers: agreement with one process, lost workers, a lost driver, missing resources."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_task import ByteTask, Diverging, Killed, Slow

from mobula.cluster.connect import check_resources, connect
from mobula.cluster.resources import WorkerResources
from mobula.cluster.spec import ClusterSpec, Platform, Train
from mobula.errors import ClusterError, TrainingError
from mobula.training import FitResult, Training, TrainingConfig, fit, fit_all
from mobula.training.loop import read_metrics

HERE = Path(__file__).parent
CONFIG = TrainingConfig(
    steps=10, batch=8, micro_batch=4, lr=1e-2, workers=2, zero=1, report_every=1, eval_every=5, checkpoint_every=2,
    monitor="loss", mode="min",
)  # fmt: skip

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]


def ray_folder() -> tempfile.TemporaryDirectory:
    """A folder for a Ray's files, some of which its last processes may still write when it is removed."""
    return tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests here; its workers find the tasks of this folder."""
    with pytest.MonkeyPatch.context() as patch, ray_folder() as folder:
        patch.setenv("PYTHONPATH", python_path())
        patch.setenv("RAY_TMPDIR", folder)
        with connect(cpus=4):
            yield


@pytest.fixture(scope="module")
def shown() -> list[dict]:
    """The rows that ``whole`` showed as its progress."""
    return []


@pytest.fixture(scope="module")
def whole(cluster: None, shown: list[dict], tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """An uninterrupted training."""
    return fit(ByteTask(), CONFIG, tmp_path_factory.mktemp("whole"), seed=3, name="test", progress=shown.append)


def python_path() -> str:
    return os.pathsep.join([str(HERE.parents[1] / "platform"), str(HERE)])


def train(directory: Path, task: ByteTask | None = None, **changes) -> FitResult:
    return fit(task or ByteTask(), dataclasses.replace(CONFIG, **changes), directory, seed=3, name="test")


def curve(result: FitResult) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "examples_per_s"} for row in read_metrics(result.history)]


def assert_same(a: FitResult, b: FitResult) -> None:
    assert curve(a) == curve(b)
    assert a.weights.read_bytes() == b.weights.read_bytes()
    assert a.last.read_bytes() == b.last.read_bytes()


def test_progress_of_the_workers_reaches_the_driver(whole: FitResult, shown: list[dict]) -> None:
    assert shown == read_metrics(whole.history)


def test_two_workers_agree_with_one_process(whole: FitResult, tmp_path: Path) -> None:
    alone = train(tmp_path, workers=0)
    for ours, theirs in zip(curve(whole), curve(alone), strict=True):
        assert ours.keys() == theirs.keys()
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize("zero", [0, 3])
def test_stages_agree_on_two_workers(whole: FitResult, tmp_path: Path, zero: int) -> None:
    staged = train(tmp_path, zero=zero)
    for ours, theirs in zip(curve(staged), curve(whole), strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_f1_killed_workers_change_nothing(whole: FitResult, tmp_path: Path) -> None:
    """Killed before the first checkpoint, which is a loss too often; then twice more at random."""
    marks = tmp_path / "kills"
    marks.mkdir()
    kills = ((1, 2), (0, random.randrange(3, 7)), (1, random.randrange(2, 5)))
    task = Killed(marks=str(marks), kills=kills)
    with pytest.raises(TrainingError, match=r"worker failures on ranks .*max_failures"):
        train(tmp_path / "run", task, max_failures=0)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    result = train(tmp_path / "run", task, max_failures=2)
    assert len(list(marks.iterdir())) == 3, f"not every kill took place: {kills}"
    assert_same(result, whole)


def test_trainings_that_share_workers_end_as_each_alone_when_one_is_killed(whole: FitResult, tmp_path: Path) -> None:
    marks = tmp_path / "kills"
    marks.mkdir()
    tasks = [ByteTask(), Killed(marks=str(marks), kills=((1, 4),))]
    config = dataclasses.replace(CONFIG, max_failures=1)
    shown: list[list[dict]] = [[], []]
    trainings = [Training(task, config, tmp_path / str(i), 3, "test", shown[i].append) for i, task in enumerate(tasks)]
    results = fit_all(trainings)
    assert len(list(marks.iterdir())) == 1
    for result in results:
        assert_same(result, whole)
    assert [row["step"] for row in shown[0]] == [row["step"] for row in curve(whole)]


DRIVER = """
import sys
from pathlib import Path
from small_task import Slow
from test_ray_backend import train

if __name__ == "__main__":
    train(Path(sys.argv[1]), Slow())
"""


def test_f4_the_same_training_resumes_after_a_killed_driver(whole: FitResult, tmp_path: Path) -> None:
    """The driver is killed with a Ray of its own; what was its Ray must not go on training."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    with ray_folder() as folder:
        environment = {**os.environ, "PYTHONPATH": python_path(), "RAY_TMPDIR": folder}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, str(script), str(tmp_path / "run")]
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        wait_for_step(tmp_path / "run" / "metrics.jsonl", random.randrange(2, 8), driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert not (tmp_path / "run" / "result.json").exists()
        assert_same(train(tmp_path / "run", Slow()), whole)


def wait_for_step(path: Path, step: int, driver: subprocess.Popen) -> None:
    deadline = time.monotonic() + 400
    while not path.is_file() or not any(row["step"] >= step for row in read_metrics(path)):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_f11_a_loss_that_is_not_finite_is_not_retried(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the loss became nan at step 3"):
        train(tmp_path, Diverging())


def test_f10_missing_resources_fail_soon_and_are_named(cluster: None, tmp_path: Path) -> None:
    spec = ClusterSpec(Path("cluster.yaml"), {}, Platform(train=Train(workers=2, gpus_per_worker=1)), {})
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"GPU: 2 workers x 1 = 2 asked for, but the cluster has 0"):
        fit(ByteTask(), CONFIG, tmp_path, seed=3, name="test", cluster=spec)
    assert time.monotonic() - started < 30


def test_f10_workers_do_not_straddle_nodes(cluster: None) -> None:
    check_resources(WorkerResources(workers=2, cpus=2))
    with pytest.raises(ClusterError, match=r"CPU: 2 workers x 3 = 6 asked for, but the cluster has 4 on 1 node"):
        check_resources(WorkerResources(workers=2, cpus=3))


def test_nothing_of_rays_own_record_is_left_to_resume_from(whole: FitResult) -> None:
    assert not (whole.weights.parent / "ray").exists()
    assert json.loads((whole.weights.parent / "result.json").read_text())["steps"] == 10
