"""Training an experiment's arms: learning rates chosen on dev, one model per arm and seed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mobula.cluster.spec import ClusterSpec
from mobula.errors import TrainingError
from mobula.retrieval.arms import Arm
from mobula.retrieval.build import ModelConfig, load_weights
from mobula.retrieval.config import Config
from mobula.retrieval.network import DocidModel
from mobula.retrieval.paradigms import LossConfig
from mobula.retrieval.tasks import DocidTask, DualEncoder, DualTask, Prepared
from mobula.training import FitResult, Training, TrainingConfig, fit_all, group

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
        return [r for seeds in self.arms.values() for r in seeds] + ([self.dual] if self.dual else [])


@dataclass(frozen=True)
class Plan:
    """A model to train: with which rates to choose from, in which directory, with how many seeds."""

    name: str
    task: DocidTask | DualTask
    rates: list[float]
    directory: Path
    seeds: int


@dataclass(frozen=True)
class Schedule:
    """How plans are trained: the training section, the share of it that a trial of a rate gets, the first seed."""

    training: TrainingConfig
    share: float
    seed: int


def fit_arms(config: Config, prepared: Prepared, directory: Path, cluster: Spec) -> Fitted:
    """Train every arm with every seed, and the dual encoder; finished trainings are taken as they are."""
    plans = list(_plans(config, prepared, directory))
    results, rates = fit_plans(plans, Schedule(config.training, config.learning_rates.share, config.seed), cluster)
    *by_arm, (dual,) = results
    return Fitted(dict(zip(config.parsed_arms, by_arm, strict=True)), dual, rates)


def fit_plans(
    plans: Sequence[Plan], schedule: Schedule, cluster: Spec
) -> tuple[list[list[FitResult]], list[list[Any]]]:
    """The trainings of each plan, one a seed, and a row [name, rate, dev value of its trial, chosen] for each rate.

    Where a plan has several rates, each trains for a share of the steps and dev chooses. Finished trainings are
    taken as they are.
    """
    with group(cluster):
        rates, tried = _choose_rates(plans, schedule, cluster)
        finals = [
            _final(plan, rate, schedule, seed)
            for plan, rate in zip(plans, rates, strict=True)
            for seed in range(plan.seeds)
        ]
        results = iter(_fit(finals, cluster))
        return [[next(results) for _ in range(plan.seeds)] for plan in plans], tried


def fit_seed(plan: Plan, schedule: Schedule, seed: int, cluster: Spec) -> FitResult:
    """The training of one seed of a plan with one rate; taken as it is if finished."""
    (rate,) = plan.rates
    return _fit([_final(plan, rate, schedule, seed)], cluster)[0]


def _plans(config: Config, prepared: Prepared, directory: Path) -> Iterator[Plan]:
    """Every arm, then the dual encoder."""
    for arm in config.parsed_arms:
        rates = getattr(config.learning_rates, arm.paradigm)
        task = docid_task(config, prepared, arm)
        yield Plan(str(arm), task, rates, directory / arm.directory, config.evaluation.seeds)
    yield Plan("dual", DualTask(prepared), config.learning_rates.dual, directory / "dual", 1)


class Trained(Protocol):
    """What of a method's config decides a docid model."""

    model: ModelConfig
    loss: LossConfig


def docid_task(config: Trained, prepared: Prepared, arm: Arm) -> DocidTask:
    """The training task of an arm."""
    return DocidTask(prepared, arm, config.model, config.loss)


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


def _choose_rates(plans: Sequence[Plan], schedule: Schedule, cluster: Spec) -> tuple[list[float], list[list[Any]]]:
    """The rate of each plan that is best on dev after a share of the training; a single rate needs no trial."""
    trials = [(plan, rate) for plan in plans if len(plan.rates) > 1 for rate in plan.rates]
    settings = {rate: settings_for(schedule.training, rate, schedule.share) for _, rate in trials}
    tried = [_trial(plan, rate, settings[rate], schedule.seed) for plan, rate in trials]
    results = _fit(tried, cluster)
    on_dev = {
        (plan.name, rate): -math.inf if result.diverged else result.best[settings[rate].monitor]
        for (plan, rate), result in zip(trials, results, strict=True)
    }
    chosen: list[float] = []
    rows: list[list[Any]] = []
    for plan in plans:
        best = max(plan.rates, key=lambda rate: on_dev.get((plan.name, rate), 0.0))
        if on_dev.get((plan.name, best)) == -math.inf:
            raise TrainingError(f"{plan.name}: the loss became NaN or infinite with every rate of {plan.rates}")
        values = {rate: on_dev.get((plan.name, rate)) for rate in plan.rates}
        shown = {rate: "diverged" if value == -math.inf else value for rate, value in values.items()}
        rows.extend([plan.name, rate, shown[rate], rate == best] for rate in plan.rates)
        chosen.append(best)
    return chosen, rows


def _trial(plan: Plan, rate: float, settings: TrainingConfig, seed: int) -> Training:
    """A short training that may collapse or diverge: dev then rejects the rate."""
    tried = replace(plan, task=replace(plan.task, guarded=False))
    return replace(_training(tried, settings, f"lr-{rate:g}", seed), trial=True)


def _final(plan: Plan, rate: float, schedule: Schedule, seed: int) -> Training:
    return _training(plan, settings_for(schedule.training, rate), f"seed-{seed}", schedule.seed + seed)


def _training(plan: Plan, settings: TrainingConfig, folder: str, seed: int) -> Training:
    return Training(plan.task, settings, plan.directory / folder, seed, plan.name, _Progress(f"{plan.name} {folder}"))


def _fit(trainings: list[Training], cluster: Spec) -> list[FitResult]:
    for t in trainings:
        log.info("to train: %s (%s), %d steps of %d", t.name, t.directory.name, t.config.total_steps, t.config.batch)
    results = fit_all(trainings, cluster)
    for t, result in zip(trainings, results, strict=True):
        how = "diverged" if result.diverged else "trained"
        log.info("%s: %s (%s) in %.0f s: best dev %s", how, t.name, t.directory.name, result.seconds, result.best)
    return results


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
