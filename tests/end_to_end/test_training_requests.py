"""What every method's trainings ask of Ray under a cluster.yaml with accelerators. No Ray is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from mobula import methods, training
from mobula.cluster.resources import WorkerResources
from mobula.cluster.spec import ClusterSpec, Platform, Train
from mobula.experiment import Run
from mobula.training import TrainingConfig, loop
from mobula.training.group import Group
from mobula.training.ray_backend import Work

pytestmark = [pytest.mark.end_to_end, pytest.mark.alone, pytest.mark.timeout(900)]
JOBS = Path(__file__).parents[2] / "jobs"
SMOKES = sorted(path for path in JOBS.glob("*/smoke.yaml"))
ASKED = WorkerResources(workers=2, cpus=3, gpus=1)
# Less to evaluate: the trainings are the same.
FEWER = {
    "diffugr": [
        *("pseudo_queries.per_document=4", "evaluation.steps=[1,2]", "evaluation.remask=[]", "evaluation.beams=[10]"),
        *("evaluation.dev_queries=20", "evaluation.max_queries=20", "evaluation.latency_queries=1"),
    ],
    "dynamic_retrieval": ["pseudo_queries.per_document=4", "evaluation.max_rows=6", "evaluation.latency_queries=1"],
    "exsearch": ["skill_questions=100", "data.train=8", "data.dev=6", "data.test=6"],
    "dro": ["data.train=200", "data.dev=100", "data.test=100"],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, WorkerResources]]:
    """(name, resources) of every training that goes to the group's workers; it is done in this process."""
    requests: list[tuple[str, WorkerResources]] = []

    def train(
        self: Group, work: Work, name: str, resources: WorkerResources, progress: Callable[[dict[str, Any]], None]
    ) -> None:
        requests.append((name, resources))
        config, cpu = dataclasses.replace(work.config, workers=0), torch.device("cpu")
        loop.train(work.task, config, work.directory, work.seed, cpu, progress, work.trial)

    monkeypatch.setattr(Group, "train", train)
    return requests


def training_sections(schema: type) -> list[str]:
    return [name for name, hint in get_type_hints(schema).items() if hint is TrainingConfig]


@pytest.mark.parametrize("recipe", SMOKES, ids=lambda path: path.parent.name)
def test_every_training_asks_for_what_cluster_yaml_says(
    recipe: Path, asked: list[tuple[str, WorkerResources]], tmp_path: Path
) -> None:
    entry = methods.load_config(recipe)
    sections = training_sections(type(entry))
    assert sections and all(getattr(entry, name).workers is None for name in sections), "a smoke trains on the cluster"
    overrides = [*(f"{name}.steps=4" for name in sections), *FEWER.get(entry.method, []), "evaluation.resamples=100"]
    config = methods.load_config(recipe, overrides)
    requested = Train(workers=ASKED.workers, cpus_per_worker=ASKED.cpus, gpus_per_worker=ASKED.gpus)
    cluster = ClusterSpec(Path("cluster.yaml"), {}, Platform(train=requested), {})
    with Run.open(tmp_path, config, cluster=cluster) as run, training.group(cluster):
        methods.get(config.method).run(run)
    assert {resources for _, resources in asked} == {ASKED}
    assert len(asked) == len(list(tmp_path.rglob(loop.RESULT))), "a training was done beside the cluster"


def test_a_method_for_every_recipe() -> None:
    assert {path.parent.name for path in SMOKES} == set(methods.METHODS)
