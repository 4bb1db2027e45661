"""Direct retrieval-augmented optimisation: a list-wise selector and a generator learn together by EM.

Z. Shi et al., "Direct Retrieval-augmented Optimization: Synergizing Knowledge Selection and Language Models", arXiv
2505.03075. x is a question with n candidate passages, z a permutation of K of them, d_z these passages, y the answer:

    log p(y|x) = log sum_z p(z|x; theta_s) p(y|x, d_z; theta_g)    what is maximised
    z_1, ..., z_m ~ p(z|x; theta_s)                                :meth:`Permutations.sample`
    l_k = log p(y|x, d_zk; theta_g)                                :meth:`Permutations.score`
    w_k = p(z_k|x,y) / p(z_k|x) = exp l_k / sum_j exp l_j          :mod:`mobula.rag.weights`, rule ``snis``
    L_S = -sum_k w_k log p(z_k|x; theta_s)                         :meth:`DRO.fit`
    L_G = -sum_k w_k log p(y|x, d_zk; theta_g)
    Q(theta_t+1) - Q(theta_t), Q = -(L_S + L_G)                    :meth:`DRO.q_gain`

The order of phases, their files and checks are those of :mod:`mobula.rag.em`, the networks are in :mod:`.networks`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mobula.alternation import Context, History, Phase, Row, Step, seed_of
from mobula.artifacts import sha256, write_jsonl
from mobula.cluster.resources import process_device
from mobula.cluster.spec import ClusterSpec
from mobula.config import digest
from mobula.experiment import identity
from mobula.portable import Portable
from mobula.rag.dro.config import KINDS, Arm, Config, EmConfig
from mobula.rag.dro.data import Questions
from mobula.rag.dro.networks import MStep, Network, Networks, Reading, network_of, weighted_loss
from mobula.rag.em import EM, Q_GAIN, STATE, WEIGH, Checkpoint, Weighted, read_state, write_state
from mobula.rag.exact import log_marginal, posterior, total_variation
from mobula.training import fit

log = logging.getLogger(__name__)
WATCHED = 1000  # training questions on which Q, its gain and the exact likelihood are followed
ROWS, GREEDY = "permutations.jsonl", "greedy.jsonl"  # what networks learn from


@dataclass
class Permutations(Portable):
    """The latent variable: permutations of a split's candidates under a checkpoint, an arm's m samples a question."""

    data: Questions
    arm: Arm
    m: int
    split: str
    checkpoint: Checkpoint

    @cached_property
    def snapshot(self) -> str:
        """Identity of the weights of both networks."""
        return digest([sha256(self.checkpoint[kind]) for kind in KINDS])[:16]

    @cached_property
    def networks(self) -> Networks:
        """Both, opened."""
        return Networks.of(self.data, **self.checkpoint)

    def sample(self, questions: Sequence[Row], seed: int) -> list[Row]:
        """z_k ~ p(z|x): rows ``{query, permutations}``, by a seed of the question's own.

        An arm without a selector has one permutation, the same each time, or one of every passage alone; one whose
        generator learns from greedy contexts has a ``greedy`` permutation beside the samples. Answers and gold passages
        take no part, unless the arm is given them.
        """
        queries, how = [question["query"] for question in questions], self.arm.samples_from
        taken = self.data.take(self.split, queries)
        if how == "selector":
            rows = self.networks.selector.sample(taken, self.m, [seed_of(seed, query) for query in queries])
        else:
            chosen = self.data.select(taken, how)
            rows = [{"permutations": [[i] for i in z] if how == "each" else [z]} for z in chosen]
        if self.arm.greedy:
            best = self.networks.select(taken, self.arm.select)
            rows = [{**row, "greedy": one.permutation} for row, one in zip(rows, best, strict=True)]
        return [{"query": query, **row} for query, row in zip(queries, rows, strict=True)]

    def score(self, samples: Sequence[Row]) -> list[Row]:
        """l_k = log p(y|x,d_zk), and what the generator itself answers."""
        listed = [row["permutations"] for row in samples]
        scores = self.networks.generator.score(self.data.take(self.split, [row["query"] for row in samples]), listed)
        return [
            {**row, **asdict(one), "log_ratio": [0.0] * len(z), "distinct": len(set(map(str, z)))}
            for row, z, one in zip(samples, listed, scores, strict=True)
        ]


@dataclass
class DRO(EM):
    """One arm and seed: both networks, or the one that the arm trains, from the cold start on."""

    config: Config
    arm: Arm
    data: Questions
    cold: Checkpoint
    seed: int

    def __post_init__(self) -> None:
        self.shard, self.draws_samples = self.config.em.shard, self.arm.samples_from == "selector"

    @property
    def em(self) -> EmConfig:
        """The E-step of the arm."""
        return self.config.em_of(self.arm)

    @property
    def start(self) -> Checkpoint:
        """The cold start."""
        return self.cold

    def identity(self) -> str:
        """Config, arm, cold start and seed."""
        return digest([identity(self.config), asdict(self.arm), self.latent(self.cold, "").snapshot, self.seed])

    def latent(self, checkpoint: Checkpoint, split: str) -> Permutations:
        """As :class:`Permutations`."""
        return Permutations(self.data, self.arm, self.em.samples, split, checkpoint)

    def questions(self, split: str) -> list[Row]:
        """By number."""
        return [{"query": query} for query in self.data.queries(split)]

    def facts(self, scores: Sequence[Row]) -> Row:
        """Of permutations parsed from free text: the share that named no passage, and that had to be filled."""
        rows = [row for row in scores if "valid" in row]
        pairs = [(n, len(z)) for row in rows for n, z in zip(row["valid"], row["permutations"], strict=True)]
        if not pairs:
            return {}
        malformed, filled = [n == 0 for n, _ in pairs], [0 < n < length for n, length in pairs]
        return {"malformed": float(np.mean(malformed)), "repaired": float(np.mean(filled))}

    def rows(self, weighted: Sequence[Weighted], checkpoint: Checkpoint, directory: Path) -> None:
        """Both networks learn from the same rows ``{query, permutations, weights}``, but for greedy contexts."""
        rows: list[Row] = []
        for one in weighted:
            if not one.weights.skipped:
                sample: Row = {name: v for name, v in one.sample.items() if name in ("query", "permutations", "valid")}
                rows.append({**sample, "weights": one.weights.values.tolist()})
        write_jsonl(directory / ROWS, rows)
        if self.arm.greedy:
            samples = [one.sample for one in weighted]
            greedy = [{"query": z["query"], "permutations": [z["greedy"]], "weights": [1.0]} for z in samples]
            write_jsonl(directory / GREEDY, greedy)

    def fit(self, data: Path, checkpoint: Checkpoint, context: Context) -> tuple[Checkpoint, Row]:
        """L_S and L_G are decoupled: each network on its own, from where it is."""
        learned = dict(checkpoint)
        for kind in self.arm.train:
            task = MStep(network_of(kind, self.data, checkpoint[kind]), "train", self._file(data, kind), 0)
            if task.examples == 0:
                log.warning("no question has weights that the %s could learn from; it stays as it is", kind)
                continue
            seed, directory = seed_of(context.seed, kind) % 2**31, context.directory / kind
            result = fit(task, self.config.fit, directory, seed=seed, name=kind, cluster=context.cluster)
            learned[kind] = result.weights
        return learned, {}

    def q_gain(self) -> Phase:
        """By how much each M-step has raised its Q, in nats a question, and H(z|x) before it."""
        return Step(Q_GAIN, self._q_gain)

    def _q_gain(self, context: Context) -> Row:
        history, size = context.history, self.config.fit.micro
        weighed = history.latest(WEIGH)
        assert weighed is not None
        before = self.current_checkpoint(history.until(context.iteration - 1))
        after, gains = self.current_checkpoint(history), {}
        for kind in KINDS:
            if after[kind] != before[kind]:
                old, new = (network_of(kind, self.data, checkpoint[kind]) for checkpoint in (before, after))
                rows = MStep(old, "train", self._file(weighed, kind), 0).rows
                gains[f"{Q_GAIN}_{kind}"] = objective(new, rows, size) - objective(old, rows, size)
        if self.draws_samples:
            selector = network_of("selector", self.data, before["selector"])
            gains["entropy"] = entropy(selector, history.rows("sample"), size)
        return gains

    def _file(self, weighed: Path, kind: str) -> Path:
        """What a network learns from."""
        return weighed / (GREEDY if kind == "generator" and self.arm.greedy else ROWS)

    def evaluation(self) -> list[Phase]:
        """Dev questions, greedily, and the likelihood that EM raises."""
        return [Step("measure", self._measure)]

    def measures(self, history: History) -> Row:
        """As :meth:`evaluation` found."""
        return history.facts("measure")

    def _measure(self, context: Context) -> Row:
        """Exact log p(y|x) where permutations are enumerated, else its estimate from m samples, which grows with m."""
        networks = Networks.of(self.data, **self.current_checkpoint(context.history))
        queries = self.data.queries("dev")
        dev = self.data.take("dev", queries)
        rows = networks.evaluate(dev, self.arm.select)
        columns = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
        # A metric that applies to no question has no place in the row.
        row = {f"dev_{name}": float(np.mean(values)) for name, values in columns.items() if values}
        row["dev_em"] = row.pop("dev_exact")
        if self.data.enumerable:
            watched = self.data.take("train", self.data.queries("train")[:WATCHED])
            return {**row, "train_log_p": float(log_marginal(*networks.exact(watched)).mean())}
        if self.arm.select != "selector":
            return row
        m = self.em.samples
        samples = networks.selector.sample(dev, m, [seed_of(self.seed, "dev", query) for query in queries])
        scores = networks.generator.score(dev, [sample["permutations"] for sample in samples])
        bounds = [float(np.logaddexp.reduce(one.log_lik) - np.log(m)) for one in scores]
        return {**row, "dev_iwae_bound": float(np.mean(bounds))}


def objective(network: Network, rows: Sequence[Row], size: int) -> float:
    """Q = sum_k w_k log p, in nats, mean over the first training questions of some rows, ``size`` at a time."""
    device = process_device()
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


def posterior_distance(networks: Networks, rows: Sequence[Row]) -> float:
    """Total variation between weighted samples and the exact posterior, mean over rows ``{query, ..., weights}``."""
    data = networks.questions
    log_prior, log_lik = networks.exact(data.take("train", [row["query"] for row in rows]))
    weights = torch.zeros_like(log_prior)
    number = {str(z): i for i, z in enumerate(data.permutations())}
    index = torch.tensor([[number[str(z)] for z in row["permutations"]] for row in rows])
    weights.scatter_add_(1, index, torch.tensor([row["weights"] for row in rows]).double())
    return float(total_variation(weights, posterior(log_prior, log_lik)).mean())


def cold_start(config: Config, data: Questions, directory: Path, seed: int, cluster: ClusterSpec | None) -> Checkpoint:
    """The weights in ``directory``: each network learns a little from questions whose gold passages are known."""
    if not (directory / STATE).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        start = {
            kind: _cold(config, data, directory / kind, seed_of(seed, kind) % 2**31, kind, cluster) for kind in KINDS
        }
        write_state(directory, start)
    return read_state(directory)


def _cold(config: Config, data: Questions, directory: Path, seed: int, kind: str, cluster: ClusterSpec | None) -> Path:
    steps = {"selector": config.cold.selector_steps, "generator": config.cold.generator_steps}[kind]
    network: Network = network_of(kind, data)

    def train(task: MStep, steps: int, name: str, where: Path) -> Path:
        return fit(task, replace(config.fit, steps=steps), where, seed=seed, name=name, cluster=cluster).weights

    if network.reads_first and config.cold.reading_steps:
        course = Reading(network, "", None, seed)
        network = replace(network, weights=train(course, config.cold.reading_steps, "reading", directory / "reading"))
    write_jsonl(directory / ROWS, data.labels(kind, seed))
    return train(MStep(network, "labelled", directory / ROWS, seed), steps, kind, directory / "fit")
