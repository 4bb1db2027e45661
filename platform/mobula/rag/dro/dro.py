"""Direct retrieval-augmented optimisation: a list-wise selector and a generator learn together by EM.

Z. Shi et al., "Direct Retrieval-augmented Optimization: Synergizing Knowledge Selection and Language Models", arXiv
2505.03075. x is a question with n candidate passages, z a permutation of K of them, d_z these passages, y the answer:

    log p(y|x) = log sum_z p(z|x; theta_s) p(y|x, d_z; theta_g)    what is maximised
    z_1, ..., z_m ~ p(z|x; theta_s)                                :class:`Sample`
    l_k = log p(y|x, d_zk; theta_g)                                :class:`Score`
    w_k = p(z_k|x,y) / p(z_k|x) = exp l_k / sum_j exp l_j          :func:`weigh`
    L_S = -sum_k w_k log p(z_k|x; theta_s)                         :func:`fit_both`
    L_G = -sum_k w_k log p(y|x, d_zk; theta_g)
    Q(theta_t+1) - Q(theta_t), Q = -L                              :func:`q_gain`

The networks are in :mod:`.networks`, other rules for w_k in :mod:`mobula.rag.weights`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobula.alternation import Context, History, Loop, Row, Sharded, Step, seed_of
from mobula.artifacts import sha256, write_json, write_jsonl
from mobula.cluster.spec import ClusterSpec
from mobula.config import digest
from mobula.errors import MobulaError
from mobula.experiment import identity
from mobula.portable import Portable
from mobula.rag import weights as e_step
from mobula.rag.dro.config import KINDS, Arm, Config
from mobula.rag.dro.data import Questions
from mobula.rag.dro.networks import MStep, Network, Networks, Reading, network_of, weighted_loss
from mobula.rag.exact import log_marginal, posterior, total_variation
from mobula.rag.objective import check_gap
from mobula.rag.weights import Sampled
from mobula.training import fit

log = logging.getLogger(__name__)
WATCHED = 1000  # training questions on which Q, its gain and the exact likelihood are followed
CHECKPOINT, WEIGHTS, GREEDY = "state.json", "weights.jsonl", "greedy.jsonl"
ALIKE = 0.05  # from which share of one another samples and weights count as all alike


class SnapshotMismatch(MobulaError):
    """Samples of other networks than those that score them."""


class EqualWeights(MobulaError):
    """Weights that prefer nothing."""


@dataclass(frozen=True)
class Pair(Portable):
    """theta = (theta_s, theta_g): the files of both networks' weights."""

    selector: Path
    generator: Path

    @cached_property
    def snapshot(self) -> str:
        """Identity of the weights of both."""
        return digest([sha256(self.selector), sha256(self.generator)])[:16]

    def write(self, directory: Path) -> None:
        """Name the weights in a phase's directory, with relative paths, so a run can be moved."""
        paths = {name: getattr(self, name).resolve() for name in KINDS}
        write_json(directory / CHECKPOINT, {n: os.path.relpath(p, directory.resolve()) for n, p in paths.items()})

    @classmethod
    def read(cls, directory: Path) -> Pair:
        """What :meth:`write` wrote."""
        row = json.loads((directory / CHECKPOINT).read_text())
        return cls(*((directory / row[name]).resolve() for name in KINDS))


@dataclass(frozen=True)
class ArmContext:
    """What the phases of one arm and seed share: the questions, and the networks of the cold start."""

    config: Config
    arm: Arm
    questions: Questions
    cold: Pair
    seed: int

    def current_checkpoint(self, history: History) -> Pair:
        """The networks that the last fit left."""
        directory = next((d for _, _, d in reversed(history.finished) if (d / CHECKPOINT).is_file()), None)
        return self.cold if directory is None else Pair.read(directory)

    def networks(self, pair: Pair) -> Networks:
        """Both networks of a pair."""
        return Networks.of(self.questions, pair.selector, pair.generator)


def cold_start(
    config: Config, questions: Questions, directory: Path, seed: int, cluster: ClusterSpec | None = None
) -> Pair:
    """The pair in ``directory``: each network learns a little from questions whose gold passages are known."""
    if not (directory / CHECKPOINT).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        Pair(*(_cold(config, questions, directory / kind, seed, kind, cluster) for kind in KINDS)).write(directory)
    return Pair.read(directory)


def _cold(
    config: Config, questions: Questions, directory: Path, seed: int, kind: str, cluster: ClusterSpec | None
) -> Path:
    steps = {"selector": config.cold.selector_steps, "generator": config.cold.generator_steps}[kind]
    drawn = seed_of(seed, kind) % 2**31
    network = network_of(kind, questions)

    def train(task: MStep, steps: int, name: str, where: str) -> Path:
        return fit(
            task, replace(config.fit, steps=steps), directory / where, seed=drawn, name=name, cluster=cluster
        ).weights

    if network.reads_first and config.cold.reading_steps:
        course = train(Reading(network, "", None, drawn), config.cold.reading_steps, "reading", "reading")
        network = network_of(kind, questions, course)
    write_jsonl(directory / WEIGHTS, questions.labels(kind, drawn))
    return train(MStep(network, "labelled", directory / WEIGHTS, drawn), steps, kind, "fit")


@dataclass
class _Worker(Portable):
    """Works with the networks as they are."""

    context: ArmContext
    history: History

    @cached_property
    def pair(self) -> Pair:
        return self.context.current_checkpoint(self.history)

    @cached_property
    def networks(self) -> Networks:
        return self.context.networks(self.pair)


@dataclass
class Sample(_Worker):
    """z_k ~ p(z|x): items ``{query}`` to rows ``{query, permutations, snapshot}``.

    An arm without a selector has one permutation, the same each time, or one of every passage alone; one whose
    generator learns from greedy contexts has a ``greedy`` permutation beside the samples. Answers and gold passages
    take no part, unless the arm is given them. A question's seed is that of the phase and the question: how questions
    are divided into shards does not matter.
    """

    m: int
    seed: int

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.cluster.pool.Worker`."""
        queries, arm = [item["query"] for item in items], self.context.arm
        questions, how = self.context.questions.take("train", queries), arm.samples_from
        if how == "selector":
            seeds = [seed_of(self.seed, query) for query in queries]
            samples = self.networks.selector.sample(questions, self.m, seeds)
        else:
            chosen = self.context.questions.select(questions, how)
            samples = [{"permutations": [[i] for i in z] if how == "each" else [z]} for z in chosen]
        if arm.greedy:
            best = self.networks.select(questions, arm.select)
            samples = [{**row, "greedy": one.permutation} for row, one in zip(samples, best, strict=True)]
        snapshot = self.pair.snapshot
        return [{"query": query, **row, "snapshot": snapshot} for query, row in zip(queries, samples, strict=True)]


class Score(_Worker):
    """l_k = log p(y|x,d_zk): rows of samples to rows ``{query, permutations, log_lik, right, reward, tokens}``."""

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.cluster.pool.Worker`; nothing is random.

        Raises:
            SnapshotMismatch: for samples of other networks.
        """
        others = {item["snapshot"] for item in items} - {self.pair.snapshot}
        if others:
            raise SnapshotMismatch(f"samples of {', '.join(sorted(others))} cannot be scored by {self.pair.snapshot}")
        questions = self.context.questions.take("train", [item["query"] for item in items])
        scores = self.networks.generator.score(questions, [item["permutations"] for item in items])
        kept = [{name: value for name, value in item.items() if name != "snapshot"} for item in items]
        return [{**item, **asdict(one)} for item, one in zip(kept, scores, strict=True)]


def weigh(context: ArmContext, phase: Context) -> Row:
    """w_k by the arm's rule, of every question that has any, and what they are like."""
    config = context.config.em_of(context.arm).weights
    rows, weights = [], []
    scores = phase.history.rows("score")
    for row in scores:
        columns = (np.array(row[name]) for name in ("log_lik", "reward", "right"))
        log_lik, reward, right = columns
        one = e_step.weigh(Sampled(log_lik, row["tokens"], np.zeros(len(log_lik)), reward, right), config)
        weights.append(one)
        if not one.skipped:
            kept: Row = {name: row[name] for name in ("query", "permutations", "valid") if name in row}
            rows.append({**kept, "weights": one.values.tolist()})
    write_jsonl(phase.directory / WEIGHTS, rows)
    if context.arm.greedy:
        greedy = [{"query": row["query"], "permutations": [row["greedy"]], "weights": [1.0]} for row in scores]
        write_jsonl(phase.directory / GREEDY, greedy)
    used = [one for one in weights if not one.skipped]
    facts = {
        "queries": len(rows),
        "skipped": len(weights) - len(used),
        "ess": float(np.mean([one.ess for one in used])) if used else 0.0,
        "iwae_bound": float(np.mean([one.log_mean_lik for one in weights])),
        "all_fail": float(np.mean([one.all_fail for one in weights])),
        "distinct_fraction": float(
            np.mean([_distinct(row["permutations"]) / len(row["permutations"]) for row in scores])
        ),
        "sample_em": float(np.mean([row["right"] for row in scores])),
        "variance": float(np.mean([np.var(np.exp(row["log_lik"])) for row in scores])),
        **parsed_shares(scores),
    }
    check_weights(context, rows, scores, facts)
    return facts


def parsed_shares(scores: Sequence[Row]) -> Row:
    """Of permutations parsed from free text: the share that named no passage, and that had to be filled."""
    rows = [row for row in scores if "valid" in row]
    pairs = [(n, len(z)) for row in rows for n, z in zip(row["valid"], row["permutations"], strict=True)]
    if not pairs:
        return {}
    malformed, filled = [n == 0 for n, _ in pairs], [0 < n < length for n, length in pairs]
    return {"malformed": float(np.mean(malformed)), "repaired": float(np.mean(filled))}


def check_weights(context: ArmContext, rows: Sequence[Row], scores: Sequence[Row], facts: Row) -> None:
    """Refuse weights that say nothing, and warn of samples that do.

    Raises:
        EqualWeights: no question prefers one of its different samples to another, though the rule is not uniform, or
            samples are missing.
    """
    em, sampled = context.config.em_of(context.arm), context.arm.samples_from == "selector"
    fewest = min(len(row["permutations"]) for row in scores)
    if sampled and fewest < em.samples:
        raise EqualWeights(f"em.samples={em.samples} permutations were sampled a question, {fewest} are left of one")
    varied = [row for row in rows if _distinct(row["permutations"]) > 1]
    if em.weights.rule != "uniform" and varied and all(len(set(row["weights"])) == 1 for row in varied):
        raise EqualWeights(f"rule {em.weights.rule} gave all samples of every query the same weight; were scores lost?")
    alike = facts["distinct_fraction"] <= 1 / em.samples + ALIKE and facts["ess"] >= (1 - ALIKE) * em.samples
    if em.samples > 1 and alike:
        log.warning("the sampler has collapsed: nearly all %d samples of a query are alike", em.samples)


def _distinct(permutations: Sequence[Any]) -> int:
    return len({json.dumps(permutation) for permutation in permutations})


def fit_both(context: ArmContext, phase: Context) -> Row:
    """L_S and L_G, decoupled: both networks, or the one that the arm trains, on the same weights from where it is."""
    now = context.current_checkpoint(phase.history)
    learned = {kind: getattr(now, kind) for kind in KINDS}
    for kind in context.arm.train:
        task = MStep(network_of(kind, context.questions, learned[kind]), "train", _learned(context, phase, kind), 0)
        if task.examples == 0:
            log.warning("no question has weights that the %s could learn from; it stays as it is", kind)
            continue
        seed = seed_of(phase.seed, kind) % 2**31
        directory, config = phase.directory / kind, context.config.fit
        learned[kind] = fit(task, config, directory, seed=seed, name=kind, cluster=phase.cluster).weights
    Pair(**learned).write(phase.directory)
    return {"trained": [kind for kind in context.arm.train if learned[kind] != getattr(now, kind)]}


def _learned(context: ArmContext, phase: Context, kind: str) -> Path:
    """The file that a network learns from."""
    weights = phase.history.latest("weigh")
    assert weights is not None
    return weights / (GREEDY if kind == "generator" and context.arm.greedy else WEIGHTS)


def q_gain(context: ArmContext, phase: Context) -> Row:
    """By how much each network's training has raised the objective Q that it was given, and H(z|x) before it.

    Raises:
        MStepFailed: if a training lowered it by more than ``em.min_q_gain``.
    """
    history, config = phase.history, context.config
    before, after = context.current_checkpoint(history.until(phase.iteration - 1)), context.current_checkpoint(history)
    gains = {}
    for kind in history.facts("fit")["trained"]:
        networks = [network_of(kind, context.questions, getattr(pair, kind)) for pair in (before, after)]
        rows = MStep(networks[0], "train", _learned(context, phase, kind), 0).rows
        old, new = (objective(network, rows, config.fit.micro) for network in networks)
        gains[f"q_gain_{kind}"] = new - old
        check_gap(new - old, config.em.min_q_gain, f"iteration {phase.iteration}, {kind}", "fit.steps")
    if context.arm.samples_from == "selector":
        selector = network_of("selector", context.questions, before.selector)
        gains["entropy"] = entropy(selector, history.rows("sample"), config.fit.micro)
    return gains


def objective(network: Network, rows: Sequence[Row], size: int) -> float:
    """Q = sum_k w_k log p, in nats, mean over the first training questions of some rows, ``size`` at a time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, kept, total = network.build(0).eval().to(device), rows[:WATCHED], 0.0
    with torch.inference_mode():
        for at in range(0, len(kept), size):
            part = kept[at : at + size]
            batch = network.batch(network.take("train", part), part)
            batch = {name: value.to(device) for name, value in batch.items()}
            total -= float(weighted_loss(network, module, batch, len(part), 1.0)) * len(part)
    return total / len(kept)


def entropy(selector: Network, samples: Sequence[Row], size: int) -> float:
    """H(z|x) in nats, estimated from rows ``{query, permutations}`` that the selector sampled.

    Of a list that was filled, only the passages that it named itself count.
    """
    rows = [{**row, "weights": [1 / len(row["permutations"])] * len(row["permutations"])} for row in samples[:WATCHED]]
    kept = selector.rows(rows)
    return -objective(selector, kept, size) if kept else 0.0


def measure(context: ArmContext, phase: Context) -> Row:
    """What the networks do with dev questions as they are, and the likelihood that EM raises.

    Where permutations are not enumerated, that is its estimate from m samples (the IWAE bound), which grows with m.
    """
    questions, networks = context.questions, context.networks(context.current_checkpoint(phase.history))
    queries = questions.queries("dev")
    dev = questions.take("dev", queries)
    rows = networks.evaluate(dev, context.arm.select)
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    # A metric that applies to no question has no place in the row.
    row = {f"dev_{name}": float(np.mean(values)) for name, values in columns.items() if values}
    row["dev_em"] = row.pop("dev_exact")
    if questions.enumerable:
        watched = questions.take("train", questions.queries("train")[:WATCHED])
        return {**row, "train_log_p": float(log_marginal(*networks.exact(watched)).mean())}
    if context.arm.select != "selector":
        return row
    m = context.config.em_of(context.arm).samples
    samples = networks.selector.sample(dev, m, [seed_of(context.seed, "dev", query) for query in queries])
    scores = networks.generator.score(dev, [sample["permutations"] for sample in samples])
    bounds = [float(np.logaddexp.reduce(one.log_lik) - np.log(m)) for one in scores]
    return {**row, "dev_iwae_bound": float(np.mean(bounds))}


def dro_loop(context: ArmContext) -> Loop:
    """The phases of an arm."""
    em, size, queries = context.config.em_of(context.arm), context.config.em.shard, context.questions.queries("train")
    measured = Step("measure", lambda phase: measure(context, phase))
    phases = [
        Sharded(
            "sample",
            lambda _: [{"query": query} for query in queries],
            lambda phase: Sample(context, phase.history, em.samples, phase.seed),
            size,
        ),
        Sharded("score", lambda phase: phase.history.rows("sample"), lambda phase: Score(context, phase.history), size),
        Step("weigh", lambda phase: weigh(context, phase)),
        Step("fit", lambda phase: fit_both(context, phase)),
        Step("q_gain", lambda phase: q_gain(context, phase)),
        measured,
    ]
    decides = [identity(context.config), asdict(context.arm), context.cold.snapshot, context.seed]
    return Loop(digest(decides), [measured], phases, _row)


def _row(history: History, iteration: int) -> Row:
    facts = history.facts("measure")
    return {**facts, **history.facts("weigh"), **history.facts("q_gain")} if iteration else facts


def posterior_distance(networks: Networks, rows: Sequence[Row]) -> float:
    """Total variation between weighted samples and the exact posterior, mean over rows ``{query, ..., weights}``."""
    questions = networks.questions
    log_prior, log_lik = networks.exact(questions.take("train", [row["query"] for row in rows]))
    weights = torch.zeros_like(log_prior)
    number = {str(z): i for i, z in enumerate(questions.permutations())}
    index = torch.tensor([[number[str(z)] for z in row["permutations"]] for row in rows])
    weights.scatter_add_(1, index, torch.tensor([row["weights"] for row in rows]).double())
    return float(total_variation(weights, posterior(log_prior, log_lik)).mean())
