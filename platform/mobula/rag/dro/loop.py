"""DRO as phases of the alternation driver: sample orders, score them, weigh them, fit both networks, measure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mobula.alternation import Context, History, Loop, Phase, Row, Sharded, Step, seed_of
from mobula.artifacts import write_jsonl
from mobula.config import digest
from mobula.errors import MobulaError
from mobula.experiment import identity
from mobula.rag.dro.config import Arm, Config
from mobula.rag.dro.networks import Shape
from mobula.rag.dro.pair import STATE, Pair, SnapshotMismatch, measure
from mobula.rag.dro.training import Split, WeightedTask
from mobula.rag.exact import posterior, total_variation
from mobula.rag.weights import Sampled, WeightConfig, weigh
from mobula.training import fit

log = logging.getLogger(__name__)
SHARD = 500
WATCHED = 1000  # training questions on which the exact likelihood is followed


class EqualWeights(MobulaError):
    """Weights that prefer nothing."""


@dataclass(frozen=True)
class Setting:
    """What the phases of one arm and seed share: the cold start's networks, and the questions of every split."""

    config: Config
    arm: Arm
    cold: Pair
    seed: int

    def split(self, name: str) -> Split:
        """The questions of a split."""
        return split_of(self.config, name)

    def standing(self, history: History) -> Pair:
        """The networks that the last fit left."""
        directory = next((d for _, _, d in reversed(history.finished) if (d / STATE).is_file()), None)
        if directory is None:
            return self.cold
        return Pair.read(directory, self.cold.selector_shape, self.cold.generator_shape)


def split_of(config: Config, name: str) -> Split:
    """The questions of a split: no two splits share a seed."""
    data = config.data
    counts = {"labelled": data.labelled, "train": data.train, "dev": data.dev, "test": data.test}
    return Split(counts[name], seed_of(data.seed, "questions", name) % 2**31)


def shapes(config: Config) -> dict[str, Shape]:
    """The sizes of both networks."""
    model = config.model
    widths = {"selector": model.selector_width, "generator": model.generator_width}
    return {name: Shape(model.layers, width, model.heads) for name, width in widths.items()}


def dro_loop(setting: Setting) -> Loop:
    """The phases of an arm."""
    em = setting.config.of(setting.arm)
    phases: list[Phase] = [
        Sharded("sample", lambda c: _queries(setting), lambda c: SampleWorker(setting, c.history, em.samples), SHARD),
        Sharded("score", lambda c: c.history.rows("sample"), lambda c: ScoreWorker(setting, c.history), SHARD),
        Step("weigh", lambda context: _weigh(context, em.weights)),
        Step("fit", lambda context: _fit(setting, context)),
        Step("measure", lambda context: _measure(setting, context.history)),
    ]
    start: list[Phase] = [Step("measure", lambda context: _measure(setting, context.history))]
    decides = [identity(setting.config), asdict(setting.arm), setting.cold.snapshot, setting.seed]
    return Loop(digest(decides), start, phases, _row)


def _queries(setting: Setting) -> list[Row]:
    return [{"query": query} for query in range(setting.config.data.train)]


@dataclass
class SampleWorker:
    """Items ``{query}`` to rows ``{query, orders, snapshot}``: orders drawn from the selector as it stands.

    It sees questions and facts; the answer and the gold facts take no part.
    """

    setting: Setting
    history: History
    samples: int

    @cached_property
    def _pair(self) -> Pair:
        return self.setting.standing(self.history)

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`."""
        queries = torch.tensor([item["query"] for item in items])
        prior = self._pair.log_prior(self.setting.split("train").draw()[queries]).exp().numpy()
        rows = []
        for item, chances in zip(items, prior, strict=True):
            chance = np.random.default_rng(seed_of(seed, item["query"]))
            orders = chance.choice(len(chances), size=self.samples, p=chances / chances.sum())
            rows.append({"query": item["query"], "orders": orders.tolist(), "snapshot": self._pair.snapshot})
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("setting", "history", "samples")}


@dataclass
class ScoreWorker:
    """Rows of samples to rows ``{query, orders, log_lik, right}``: log p(y|x,d_z) of the gold answer after each order.

    ``right`` says whether the generator's own answer is the gold one.
    """

    setting: Setting
    history: History

    @cached_property
    def _pair(self) -> Pair:
        return self.setting.standing(self.history)

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`; nothing is drawn.

        Raises:
            SnapshotMismatch: for samples of other networks.
        """
        others = {item["snapshot"] for item in items} - {self._pair.snapshot}
        if others:
            raise SnapshotMismatch(f"samples of {', '.join(sorted(others))} cannot be scored by {self._pair.snapshot}")
        questions = self.setting.split("train").draw()[torch.tensor([item["query"] for item in items])]
        orders = torch.tensor([item["orders"] for item in items])
        found, said = self._pair.judged(questions, orders)
        return [
            {"query": item["query"], "orders": item["orders"], "log_lik": scores, "right": right}
            for item, scores, right in zip(items, found.tolist(), said.double().tolist(), strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("setting", "history")}


def _weigh(context: Context, config: WeightConfig) -> Row:
    """Weights of every query that has any, and what they are like."""
    rows, found = [], []
    scores = context.history.rows("score")
    for row in scores:
        right, zeros = np.array(row["right"]), np.zeros(len(row["orders"]))
        weights = weigh(Sampled(np.array(row["log_lik"]), 1, zeros, right, right), config)
        found.append(weights)
        if not weights.skipped:
            rows.append({"query": row["query"], "orders": row["orders"], "weights": weights.values.tolist()})
    write_jsonl(context.directory / "weights.jsonl", rows)
    kept = [weights for weights in found if not weights.skipped]
    _check(config, rows, scores)
    return {
        "queries": len(rows),
        "skipped": len(found) - len(kept),
        "ess": float(np.mean([weights.ess for weights in kept])) if kept else 0.0,
        "bound": float(np.mean([weights.log_mean_lik for weights in found])),
        "all_fail": float(np.mean([weights.all_fail for weights in found])),
        "unique": float(np.mean([len(set(row["orders"])) / len(row["orders"]) for row in scores])),
        "sample_em": float(np.mean([row["right"] for row in scores])),
        "variance": float(np.mean([np.var(np.exp(row["log_lik"])) for row in scores])),
    }


def _check(config: WeightConfig, rows: Sequence[Row], scores: Sequence[Row]) -> None:
    """Refuse weights that say nothing, and warn of samples that do.

    Raises:
        EqualWeights: no query prefers one of its different samples to another, though the rule is not uniform.
    """
    varied = [row for row in rows if len(set(row["orders"])) > 1]
    if config.rule != "uniform" and varied and all(len(set(row["weights"])) == 1 for row in varied):
        raise EqualWeights(f"rule {config.rule} gave all samples of every query the same weight; were scores lost?")
    samples = len(scores[0]["orders"])
    if samples > 1 and all(len(set(row["orders"])) == 1 for row in scores):
        log.warning("the sampler has collapsed: all %d samples of every query are alike; weights say nothing", samples)


def _fit(setting: Setting, context: Context) -> Row:
    """Both networks, or the one that the arm trains, on the same weights, each from where it stands."""
    weights = context.history.latest("weigh")
    assert weights is not None
    standing = setting.standing(context.history)
    learned = {"selector": standing.selector, "generator": standing.generator}
    sizes = shapes(setting.config)
    for kind in setting.arm.train:
        rows = weights / "weights.jsonl"
        task = WeightedTask(kind, sizes[kind], setting.split("train"), rows, learned[kind], 0)
        seed = seed_of(context.seed, kind) % 2**31
        learned[kind] = fit(task, setting.config.fit, context.directory / kind, seed=seed, name=kind).weights
    replace(standing, selector=learned["selector"], generator=learned["generator"]).write(context.directory)
    return {"trained": list(setting.arm.train)}


def _measure(setting: Setting, history: History) -> Row:
    pair = setting.standing(history)
    watched = setting.split("train").draw()[torch.arange(min(WATCHED, setting.config.data.train))]
    dev = measure(pair, setting.split("dev").draw())
    return {
        "dev_em": float(dev.exact.mean()),
        "dev_gold": float(dev.gold.mean()),
        "dev_log_p": float(dev.log_p.mean()),
        "train_log_p": float(measure(pair, watched).log_p.mean()),
    }


def _row(history: History, iteration: int) -> Row:
    facts = history.facts("measure")
    return {**facts, **history.facts("weigh")} if iteration else facts


def distance(pair: Pair, setting: Setting, weights: Sequence[Row]) -> float:
    """Total variation between weighted samples and the exact posterior, mean over the queries of some rows."""
    questions = setting.split("train").draw()[torch.tensor([row["query"] for row in weights])]
    log_prior = pair.log_prior(questions)
    found = torch.zeros_like(log_prior)
    orders, values = (torch.tensor([row[name] for row in weights]) for name in ("orders", "weights"))
    found.scatter_add_(1, orders, values.double())
    return float(total_variation(found, posterior(log_prior, pair.log_lik(questions))).mean())
