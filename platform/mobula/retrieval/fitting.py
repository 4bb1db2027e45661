"""Training an experiment's arms: learning rates chosen on dev, one model per arm and seed."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mobula.cluster.connect import connect
from mobula.cluster.spec import ClusterSpec
from mobula.retrieval.arms import Arm
from mobula.retrieval.build import load_weights
from mobula.retrieval.config import Config
from mobula.retrieval.network import DocidModel
from mobula.retrieval.tasks import DocidTask, DualEncoder, DualTask, Prepared
from mobula.training import FitResult, Task, TrainingConfig, fit

log = logging.getLogger(__name__)
Spec = ClusterSpec | None
MONITOR = "hit@10"
EVALUATIONS = 10  # evaluations on dev in one training, unless training.eval_every says otherwise


@dataclass
class Fitted:
    """What training left: results by arm and seed, the dual encoder, and the rates that were tried and chosen."""

    arms: dict[Arm, list[FitResult]] = field(default_factory=dict)
    dual: FitResult | None = None
    rates: list[list[Any]] = field(default_factory=list)

    @property
    def results(self) -> list[FitResult]:
        """Every final training."""
        return [r for found in self.arms.values() for r in found] + ([self.dual] if self.dual else [])


def fit_arms(config: Config, prepared: Prepared, directory: Path, cluster: Spec) -> Fitted:
    """Train every arm with every seed, and the dual encoder; finished trainings are taken as they are."""
    with _ray(config.training, cluster):
        return _fit_all(config, prepared, directory, cluster)


def _ray(training: TrainingConfig, cluster: Spec) -> contextlib.AbstractContextManager[None]:
    """One Ray for all trainings of a run, where any of them uses workers."""
    given = cluster.platform.train.workers if cluster else 0
    workers = given if training.workers is None else training.workers
    return connect() if workers else contextlib.nullcontext()


def _fit_all(config: Config, prepared: Prepared, directory: Path, cluster: Spec) -> Fitted:
    fitted = Fitted()
    for arm in config.parsed_arms:
        task = docid_task(config, prepared, arm)
        rates = getattr(config.learning_rates, arm.paradigm)
        settings = _chosen(config, task, rates, directory / arm.directory, str(arm), cluster, fitted)
        fitted.arms[arm] = [
            _fit(task, settings, directory / arm.directory / f"seed-{seed}", config.seed + seed, str(arm), cluster)
            for seed in range(config.evaluation.seeds)
        ]
    dual = DualTask(prepared)
    settings = _chosen(config, dual, config.learning_rates.dual, directory / "dual", "dual", cluster, fitted)
    fitted.dual = _fit(dual, settings, directory / "dual" / "seed-0", config.seed, "dual", cluster)
    return fitted


def docid_task(config: Config, prepared: Prepared, arm: Arm) -> DocidTask:
    """The training task of an arm."""
    return DocidTask(prepared, arm, config.model, config.loss.weight)


def load_arm(task: DocidTask, result: FitResult) -> DocidModel:
    """The trained network of an arm."""
    model = task.build()
    load_weights(model, result.weights)
    return model.eval()


def load_dual(prepared: Prepared, result: FitResult) -> DualEncoder:
    """The trained dual encoder."""
    model = DualTask(prepared).build()
    load_weights(model, result.weights)
    return model.eval()


def settings_for(training: TrainingConfig, lr: float, share: float = 1.0) -> TrainingConfig:
    """The training section with a rate, a share of its length, and dev Hit@10 as the choice of weights."""
    steps = max(1, round(training.total_steps * share))
    return replace(
        training,
        steps=steps,
        lr=lr,
        monitor=training.monitor or MONITOR,
        eval_every=min(steps, training.eval_every or max(1, training.total_steps // EVALUATIONS)),
    )


def _chosen(
    config: Config,
    task: Task,
    rates: list[float],
    directory: Path,
    name: str,
    cluster: Spec,
    fitted: Fitted,
) -> TrainingConfig:
    """Settings with the learning rate of the best dev Hit@10; a single rate needs no trial."""
    if len(rates) == 1:
        fitted.rates.append([name, rates[0], None, True])
        return settings_for(config.training, rates[0])
    found = []
    for rate in rates:
        settings = settings_for(config.training, rate, config.learning_rates.share)
        result = _fit(task, settings, directory / f"lr-{rate:g}", config.seed, f"{name} lr={rate:g}", cluster)
        found.append(result.best[settings.monitor])
    best = rates[found.index(max(found))]
    fitted.rates.extend([name, rate, value, rate == best] for rate, value in zip(rates, found, strict=True))
    return settings_for(config.training, best)


def _fit(task: Task, settings: TrainingConfig, directory: Path, seed: int, name: str, cluster: Spec) -> FitResult:
    log.info("training %s (seed %d): %d steps of %d examples", name, seed, settings.total_steps, settings.batch)
    result = fit(task, settings, directory, seed=seed, name=name, cluster=cluster, progress=_Progress(name))
    log.info("trained %s in %.0f s: best dev %s", name, result.seconds, result.best)
    return result


class _Progress:
    """Logs every evaluation on dev."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loss = ""

    def __call__(self, row: dict[str, Any]) -> None:
        if "loss" in row:
            self.loss = f"loss {row['loss']:.3f}, "
        if "dev" in row:
            dev = ", ".join(f"{name} {value:.3f}" for name, value in row["dev"].items())
            log.info("%s step %d: %sdev %s", self.name, row["step"], self.loss, dev)
