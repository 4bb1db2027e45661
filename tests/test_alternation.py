"""The driver of alternating methods: what is done once, what counts once, and where it ends."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mobula import environment
from mobula.alternation import (
    AlternationConfig,
    Context,
    History,
    Loop,
    Row,
    Sharded,
    Step,
    best_iteration,
    run,
    seed_of,
)
from mobula.cluster.pool import pool
from mobula.cluster.resources import WorkerResources, process_device
from mobula.cluster.spec import ClusterSpec, Platform, Train
from mobula.errors import ClusterError, RunConflict
from mobula.training import TrainingConfig, group
from mobula.training.ray_backend import Work
from tests import alternating
from tests.alternating import DATA, gaussian

CONFIG = AlternationConfig(iterations=3, actors=0)


def results(rows: list[Row]) -> list[Row]:
    """Rows without how long they took."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The rows of a run that nothing interrupts."""
    return run(gaussian(), CONFIG, tmp_path_factory.mktemp("whole"), seed=1).rows


def test_every_item_counts_once_in_every_iteration(whole: list[Row]) -> None:
    assert [row["iteration"] for row in whole] == [0, 1, 2, 3]
    assert all(row["samples"] == len(DATA) and row["sum"] == sum(range(len(DATA))) for row in whole[1:])
    assert whole[3]["error"] < whole[1]["error"] < whole[0]["error"]


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(whole: list[Row], tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    environment = {**os.environ, "SLOW": "0.15"}
    command = [sys.executable, "-m", alternating.__name__, str(tmp_path / "run")]
    kills = 0
    for _ in range(60):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            printed, _ = process.communicate(timeout=chance.uniform(0.5, 2.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert kills > 0
    assert results(json.loads(printed)) == results(whole)


def test_finished_shards_are_not_computed_again(whole: list[Row], tmp_path: Path) -> None:
    calls: list[int] = []

    class Counting(alternating.Scorer):
        def process(self, items, seed):
            calls.append(len(items))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().process(items, seed)

    loop = gaussian()
    sample, score, move = loop.phases
    assert isinstance(score, Sharded)
    counted = replace(loop, phases=[sample, replace(score, worker=lambda _: Counting()), move])
    one = replace(CONFIG, iterations=1)
    with pytest.raises(KeyboardInterrupt):
        run(counted, one, tmp_path, seed=1)
    outcome = run(counted, one, tmp_path, seed=1)
    assert calls == [4, 4, 4, 4, 4, 4, 3]  # the third was interrupted, so it is there twice
    assert results(outcome.rows) == results(whole[:2])


def test_a_resumed_phase_works_on_the_inputs_it_began_with(tmp_path: Path) -> None:
    asked: list[int] = []

    def items(_):
        asked.append(1)
        return [{"n": len(asked)}]

    class Fails:
        def process(self, items, seed):
            if len(asked) == 1 and not (tmp_path / "again").exists():
                (tmp_path / "again").touch()
                raise KeyboardInterrupt
            return items

    loop = Loop("x", [], [Sharded("only", items, lambda _: Fails())], lambda history, _: {})
    for _ in range(2):
        try:
            outcome = run(loop, replace(CONFIG, iterations=1), tmp_path / "run", seed=0)
        except KeyboardInterrupt:
            continue
    assert asked == [1]
    assert outcome.history.rows("only") == [{"n": 1}]


def test_actors_give_the_same_rows_and_a_lost_one_is_replaced(whole: list[Row], tmp_path: Path) -> None:
    config = replace(CONFIG, actors=2)
    outcome = run(gaussian(tmp_path / "died"), config, tmp_path / "run", seed=1)
    assert (tmp_path / "died").exists()
    assert results(outcome.rows) == results(whole)
    with pytest.raises(ClusterError, match="1 actors were lost"):
        run(gaussian(tmp_path / "again"), replace(config, max_failures=0), tmp_path / "none", seed=1)


def test_loops_share_the_actors_of_a_pool_and_training_finds_every_cpu(whole: list[Row], tmp_path: Path) -> None:
    config = replace(CONFIG, actors=2)
    processes: set[int] = set()
    free: list[float] = []

    def look(_: Context) -> Row:
        import ray

        time.sleep(0.5)  # Ray counts what is free now and then
        free.append(ray.available_resources()["CPU"] / ray.cluster_resources()["CPU"])
        return {}

    loop = Loop("pids", [], [Sharded("who", lambda _: [{}] * 8, lambda _: alternating.Who(), 1), Step("look", look)],
                lambda *_: {})  # fmt: skip
    with pool(config.actors, None) as workers:
        for number in range(2):
            outcome = run(loop, replace(config, iterations=2), tmp_path / str(number), seed=1, pool=workers)
            processes |= {row["pid"] for row in outcome.history.rows("who")}
        assert results(run(gaussian(), config, tmp_path / "other", seed=1, pool=workers).rows) == results(whole)
    assert len(processes) <= 2
    assert os.getpid() not in processes
    assert free == [1.0] * 4


class Booked:
    """In place of Ray Train's workers: actors of Ray that hold the GPUs that the workers would, and train nothing."""

    started = 0

    def __init__(self, resources: WorkerResources, name: str) -> None:
        import ray

        Booked.started += 1
        self.resources, self.standing = resources, True
        self.holder = ray.remote(alternating.Who).options(num_cpus=0, num_gpus=resources.gpus).remote()
        ray.get(self.holder.process.remote([{}], 0), timeout=60)  # nobody gives it GPUs that another holds
        time.sleep(1)  # Ray counts what is free now and then

    def train(self, work: Work, watch: Callable[[], None]) -> None:
        return None

    def close(self) -> None:
        import ray

        self.standing = False
        ray.kill(self.holder)


@pytest.fixture
def two_gpus() -> Iterator[None]:
    """A Ray that believes that its node has two GPUs."""
    import ray

    environment.driver_environment()
    ray.init(address="local", num_cpus=2, num_gpus=2, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.end_to_end
@pytest.mark.parametrize(("gpus", "starts"), [(1.0, 1), (2.0, 2)])
def test_actors_and_workers_keep_their_gpus_unless_there_are_too_few(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: float, starts: int
) -> None:
    """Two iterations of sampling and training. Where GPUs suffice for one of the two, idle ones end before the other
    starts; and all end before this process takes a GPU."""
    monkeypatch.setattr(import_module("mobula.training.group"), "Workers", Booked)
    monkeypatch.setattr(Booked, "started", 0)
    processes: set[int] = set()

    def train(context: Context) -> Row:
        work = Work(None, TrainingConfig(steps=1, workers=1), context.directory, 0)  # nobody looks at its task
        standing.train(work, "test", WorkerResources(1, gpus=gpus), lambda row: None)
        return {}

    def measure(history: History, iteration: int) -> Row:
        processes.update(row["pid"] for row in (history.rows("who") if iteration else []))
        return {}

    loop = Loop(
        "gpus", [], [Sharded("who", lambda _: [{}], lambda _: alternating.Who()), Step("train", train)], measure
    )
    spec = ClusterSpec(Path("cluster.yaml"), {}, Platform(train=Train(workers=1, gpus_per_worker=gpus)), {})
    with group(spec) as standing, pool(1, spec) as actors:
        run(loop, replace(CONFIG, iterations=2), tmp_path, seed=0, pool=actors)
        assert (len(processes), Booked.started) == (starts, starts)
        assert bool(actors.actors) is (starts == 1) and standing._workers.standing
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        assert process_device() == torch.device("cuda")
        assert not actors.actors and standing._workers is None


def test_another_loop_or_seed_is_refused(tmp_path: Path) -> None:
    run(gaussian(), replace(CONFIG, iterations=1), tmp_path, seed=1)
    with pytest.raises(RunConflict, match="seed differ"):
        run(gaussian(), CONFIG, tmp_path, seed=2)
    with pytest.raises(RunConflict, match="identity differ"):
        run(replace(gaussian(), identity="other"), CONFIG, tmp_path, seed=1)


def test_a_longer_run_goes_on_with_a_shorter_one(whole: list[Row], tmp_path: Path) -> None:
    run(gaussian(), replace(CONFIG, iterations=1), tmp_path, seed=1)
    assert results(run(gaussian(), CONFIG, tmp_path, seed=1).rows) == results(whole)


def scripted(values: list[float], **more: object) -> Loop:
    """A loop whose rows have these values."""
    nothing = Step("nothing", lambda _: time.sleep(0.002) or {})
    return Loop("scripted", [nothing], [nothing], lambda _, iteration: {"v": values[iteration], **more})


@pytest.mark.parametrize(
    ("change", "rows", "best", "ended"),
    [
        ({}, 5, 4, "iterations"),
        ({"monitor": "v"}, 5, 1, "iterations"),
        ({"monitor": "v", "mode": "min"}, 5, 2, "iterations"),
        ({"monitor": "v", "patience": 2}, 4, 1, "patience"),
        ({"max_hours": 1e-9}, 1, 0, "max_hours"),
    ],
)
def test_the_best_iteration_and_the_end(
    tmp_path: Path, change: dict[str, object], rows: int, best: int, ended: str
) -> None:
    values = [1.0, 3.0, 0.0, 3.0, 2.0]
    for _ in range(2):  # a second call finds it as it was
        outcome = run(scripted(values), replace(CONFIG, iterations=4, **change), tmp_path, seed=0)
        assert (len(outcome.rows), outcome.best, outcome.ended) == (rows, best, ended)


def test_a_row_can_end_the_loop(tmp_path: Path) -> None:
    outcome = run(scripted([0.0] * 4, stop=True), CONFIG, tmp_path, seed=0)
    assert (len(outcome.rows), outcome.ended) == (1, "stop")


def test_a_metric_that_is_not_a_number_is_never_the_best() -> None:
    rows = [{"v": float("nan")}, {"v": -1.0}, {"v": float("nan")}]
    assert best_iteration(rows, replace(CONFIG, monitor="v")) == 1


def test_what_stood_at_an_earlier_iteration_can_be_had(tmp_path: Path) -> None:
    outcome = run(gaussian(), CONFIG, tmp_path, seed=1)
    assert [alternating.mean(outcome.history.until(i)) for i in range(4)] == [row["mean"] for row in outcome.rows]
    with pytest.raises(KeyError, match="has not run yet"):
        History(tmp_path).facts("move")


def test_seeds_of_phases_and_shards_differ() -> None:
    places = [(1, 1, "a"), (2, 1, "a"), (1, 2, "a"), (1, 1, "b"), (1, 1, "a", 0), (1, 1, "a", 1), (11, "a"), (1, "1a")]
    assert len({seed_of(*place) for place in places}) == len(places)


def test_a_renamed_phase_keeps_its_seed(tmp_path: Path) -> None:
    """Another name is another seed, unless the phase says what it was seeded as."""
    seeds: dict[str, int] = {}

    def keep(context: Context) -> Row:
        seeds[context.directory.name] = context.seed
        return {}

    phases = [Step("old", keep), Step("new", keep), Step("renamed", keep, seeded_as="old")]
    loop = Loop("seeds", phases, phases, lambda history, iteration: {})
    run(loop, AlternationConfig(iterations=1, actors=0), tmp_path, seed=0)
    assert seeds["02-renamed"] == seeds["00-old"] != seeds["01-new"]
