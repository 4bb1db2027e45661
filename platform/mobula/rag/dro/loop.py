"""DRO as phases of the alternation driver: sample orders, score them, weigh them, fit both networks, measure."""

from __future__ import annotations

import json
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
from mobula.rag.dro.config import EACH, Arm, Config
from mobula.rag.dro.gap import entropy, objective
from mobula.rag.dro.pair import STATE, Pair, SnapshotMismatch
from mobula.rag.dro.source import Measured, Networks, Source
from mobula.rag.exact import log_marginal, posterior, total_variation
from mobula.rag.objective import check_q_gain
from mobula.rag.weights import Sampled, weigh
from mobula.training import fit

log = logging.getLogger(__name__)
WATCHED = 1000  # training questions on which the exact likelihood is followed
WEIGHTS, GREEDY, SAMPLES = "weights.jsonl", "greedy.jsonl", "samples.jsonl"
ALIKE = 0.05  # from which share of one another samples and weights count as all alike
SHORT = {"exact": "em"}  # measures that have a shorter name in an iteration's row


class EqualWeights(MobulaError):
    """Weights that prefer nothing."""


@dataclass(frozen=True)
class Setting:
    """What the phases of one arm and seed share: the source, and the cold start's networks."""

    config: Config
    arm: Arm
    source: Source
    cold: Pair
    seed: int

    def standing(self, history: History) -> Pair:
        """The networks that the last fit left."""
        directory = next((d for _, _, d in reversed(history.finished) if (d / STATE).is_file()), None)
        return self.cold if directory is None else Pair.read(directory)


def dro_loop(setting: Setting) -> Loop:
    """The phases of an arm."""
    em, size = setting.config.of(setting.arm), setting.config.em.shard
    phases: list[Phase] = [
        Sharded(
            "sample", lambda c: _queries(setting), lambda c: SampleWorker(setting, c.history, em.samples, c.seed), size
        ),
        Sharded("score", lambda c: c.history.rows("sample"), lambda c: ScoreWorker(setting, c.history), size),
        Step("weigh", lambda context: _weigh(setting, context)),
        Step("fit", lambda context: _fit(setting, context)),
        Step("gap", lambda context: _gap(setting, context)),
        Step("measure", lambda context: _measure(setting, context)),
    ]
    start: list[Phase] = [Step("measure", lambda context: _measure(setting, context))]
    decides = [identity(setting.config), asdict(setting.arm), setting.cold.snapshot, setting.seed]
    return Loop(digest(decides), start, phases, _row)


def _queries(setting: Setting) -> list[Row]:
    return [{"query": query} for query in setting.source.queries("train")]


@dataclass
class _Worker:
    """Works with the networks that stand."""

    setting: Setting
    history: History

    @cached_property
    def _pair(self) -> Pair:
        return self.setting.standing(self.history)

    @cached_property
    def _networks(self) -> Networks:
        return self.setting.source.open(self._pair)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


@dataclass
class SampleWorker(_Worker):
    """Items ``{query}`` to rows ``{query, orders, snapshot}``: orders drawn from the selector as it stands.

    An arm without a selector has one order, the same each time, or one of every passage alone; one whose generator
    learns from greedy contexts has a ``greedy`` order beside the samples. Answers and gold passages take no part,
    unless the arm is given them. A question's seed is that of the phase and the question: how questions are divided
    into shards does not matter.
    """

    samples: int
    seed: int

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`."""
        queries, arm = [item["query"] for item in items], self.setting.arm
        how = arm.teacher
        if how == "selector":
            drawn = self._networks.sample(
                "train", queries, self.samples, [seed_of(self.seed, query) for query in queries]
            )
        else:
            named = self._networks.choose("train", queries, how)
            drawn = [{"orders": [[place] for place in order] if how == EACH else [order]} for order in named]
        if arm.greedy:
            best = self._networks.choose("train", queries, arm.select)
            drawn = [{**row, "greedy": order} for row, order in zip(drawn, best, strict=True)]
        return [
            {"query": query, **row, "snapshot": self._pair.snapshot} for query, row in zip(queries, drawn, strict=True)
        ]


class ScoreWorker(_Worker):
    """Rows of samples to rows ``{query, orders, log_lik, right, reward, tokens}``: what the generator makes of them.

    ``log_lik`` is log p(y|x,d_z) of the gold answer, ``right`` and ``reward`` are exact match and F1 of the
    generator's own.
    """

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`; nothing is drawn.

        Raises:
            SnapshotMismatch: for samples of other networks.
        """
        others = {item["snapshot"] for item in items} - {self._pair.snapshot}
        if others:
            raise SnapshotMismatch(f"samples of {', '.join(sorted(others))} cannot be scored by {self._pair.snapshot}")
        found = self._networks.judge("train", [item["query"] for item in items], [item["orders"] for item in items])
        kept = [{name: value for name, value in item.items() if name != "snapshot"} for item in items]
        return [{**item, **asdict(judged)} for item, judged in zip(kept, found, strict=True)]


def _weigh(setting: Setting, context: Context) -> Row:
    """Weights of every query that has any, and what they are like."""
    config = setting.config.of(setting.arm).weights
    rows, found = [], []
    scores = context.history.rows("score")
    for row in scores:
        zeros = np.zeros(len(row["orders"]))
        reward, right = np.array(row["reward"]), np.array(row["right"])
        weights = weigh(Sampled(np.array(row["log_lik"]), row["tokens"], zeros, reward, right), config)
        found.append(weights)
        if not weights.skipped:
            drawn: Row = {name: row[name] for name in ("query", "orders", "valid") if name in row}
            rows.append({**drawn, "weights": weights.values.tolist()})
    write_jsonl(context.directory / WEIGHTS, rows)
    greedy = [{"query": row["query"], "orders": [row["greedy"]], "weights": [1.0]} for row in scores if "greedy" in row]
    if greedy:
        write_jsonl(context.directory / GREEDY, greedy)
    kept_weights = [weights for weights in found if not weights.skipped]
    facts = {
        "queries": len(rows),
        "skipped": len(found) - len(kept_weights),
        "ess": float(np.mean([weights.ess for weights in kept_weights])) if kept_weights else 0.0,
        "bound": float(np.mean([weights.log_mean_lik for weights in found])),
        "all_fail": float(np.mean([weights.all_fail for weights in found])),
        "unique": float(np.mean([_different(row["orders"]) / len(row["orders"]) for row in scores])),
        "sample_em": float(np.mean([row["right"] for row in scores])),
        "variance": float(np.mean([np.var(np.exp(row["log_lik"])) for row in scores])),
        **_told(scores),
    }
    _check(setting, rows, scores, facts)
    return facts


def _told(scores: Sequence[Row]) -> Row:
    """Of orders read from free text: the share that named no passage, and that had to be filled."""
    rows = [row for row in scores if "valid" in row]
    read = [(valid, len(order)) for row in rows for valid, order in zip(row["valid"], row["orders"], strict=True)]
    if not read:
        return {}
    return {
        "malformed": float(np.mean([valid == 0 for valid, _ in read])),
        "repaired": float(np.mean([0 < valid < length for valid, length in read])),
    }


def _different(orders: Sequence[Any]) -> int:
    return len({json.dumps(order) for order in orders})


def _check(setting: Setting, rows: Sequence[Row], scores: Sequence[Row], facts: Row) -> None:
    """Refuse weights that say nothing, and warn of samples that do.

    Raises:
        EqualWeights: no query prefers one of its different samples to another, though the rule is not uniform, or
            samples are missing.
    """
    em, drawn = setting.config.of(setting.arm), setting.arm.teacher == "selector"
    fewest = min(len(row["orders"]) for row in scores)
    if drawn and fewest < em.samples:
        raise EqualWeights(f"em.samples={em.samples} orders were drawn of every question, {fewest} are left of one")
    varied = [row for row in rows if _different(row["orders"]) > 1]
    if em.weights.rule != "uniform" and varied and all(len(set(row["weights"])) == 1 for row in varied):
        raise EqualWeights(f"rule {em.weights.rule} gave all samples of every query the same weight; were scores lost?")
    if em.samples > 1 and facts["unique"] <= 1 / em.samples + ALIKE and facts["ess"] >= (1 - ALIKE) * em.samples:
        log.warning("the sampler has collapsed: nearly all %d samples of a query are alike", em.samples)


def _fit(setting: Setting, context: Context) -> Row:
    """Both networks, or the one that the arm trains, on the same weights, each from where it stands."""
    weights = context.history.latest("weigh")
    assert weights is not None
    standing = setting.standing(context.history)
    learned = {"selector": standing.selector, "generator": standing.generator}
    for kind in setting.arm.train:
        task = setting.source.task(kind, "train", weights / _taught(setting.arm, kind), learned[kind], 0)
        if task.examples == 0:
            log.warning("no question has weights that the %s could learn from; it stays as it is", kind)
            continue
        seed = seed_of(context.seed, kind) % 2**31
        learned[kind] = fit(task, setting.config.fit, context.directory / kind, seed=seed, name=kind).weights
    replace(standing, **learned).write(context.directory)
    return {"trained": [kind for kind in setting.arm.train if learned[kind] != getattr(standing, kind)]}


def _taught(arm: Arm, kind: str) -> str:
    """The file that a network learns from."""
    return GREEDY if kind == "generator" and arm.greedy else WEIGHTS


def _gap(setting: Setting, context: Context) -> Row:
    """By how much each network's training has raised the objective that it was given, and H(z|x) before it.

    Raises:
        MStepFailed: if a training lowered it by more than ``em.min_q_gain``.
    """
    history, config, source = context.history, setting.config, setting.source
    weights = history.latest("weigh")
    assert weights is not None
    before, after = setting.standing(history.until(context.iteration - 1)), setting.standing(history)
    found = {}
    for kind in history.facts("fit")["trained"]:
        rows = weights / _taught(setting.arm, kind)
        # One task reads the rows; the other is asked for its network alone.
        tasks = [source.task(kind, "train", rows, getattr(pair, kind), 0) for pair in (before, after)]
        old, new = (objective(tasks[0], task.build(), config.fit.micro) for task in tasks)
        found[f"gap_{kind}"] = new - old
        check_q_gain(new - old, config.em.min_q_gain, f"iteration {context.iteration}, {kind}", "fit.steps")
    if setting.arm.teacher == "selector":
        file = context.directory / SAMPLES
        found["entropy"] = entropy(source, history.rows("sample"), before.selector, file, config.fit.micro)
    return found


def _measure(setting: Setting, context: Context) -> Row:
    """What the networks that stand do with dev questions, and the likelihood that EM raises.

    Where orders cannot be enumerated, that is its estimate from m samples, which grows with m.
    """
    source, pair = setting.source, setting.standing(context.history)
    networks, dev = source.open(pair), source.queries("dev")
    measured = networks.measure("dev", dev, setting.arm.select)
    # A measure that applies to no question has no place in the row.
    found = {f"dev_{SHORT.get(n, n)}": float(np.nanmean(v)) for n, v in measured.items() if np.isfinite(v).any()}
    if source.enumerable:
        watched = source.queries("train")[:WATCHED]
        return {**found, "train_log_p": float(log_marginal(*networks.exact("train", watched)).mean())}
    if setting.arm.select != "selector":
        return found
    samples = setting.config.of(setting.arm).samples
    rows = networks.sample("dev", dev, samples, [seed_of(setting.seed, "dev", query) for query in dev])
    judged = networks.judge("dev", dev, [row["orders"] for row in rows])
    bounds = [float(np.logaddexp.reduce(one.log_lik) - np.log(samples)) for one in judged]
    return {**found, "dev_bound": float(np.mean(bounds))}


def _row(history: History, iteration: int) -> Row:
    facts = history.facts("measure")
    return {**facts, **history.facts("weigh"), **history.facts("gap")} if iteration else facts


def measure(setting: Setting, pair: Pair, how: str) -> Measured:
    """What a pair does with the test questions."""
    return setting.source.open(pair).measure("test", setting.source.queries("test"), how)


def distance(networks: Networks, source: Source, weights: Sequence[Row]) -> float:
    """Total variation between weighted samples and the exact posterior, mean over the queries of some rows."""
    log_prior, log_lik = networks.exact("train", [row["query"] for row in weights])
    found = torch.zeros_like(log_prior)
    place = {str(order): number for number, order in enumerate(source.orders())}
    orders = torch.tensor([[place[str(order)] for order in row["orders"]] for row in weights])
    found.scatter_add_(1, orders, torch.tensor([row["weights"] for row in weights]).double())
    return float(total_variation(found, posterior(log_prior, log_lik)).mean())
