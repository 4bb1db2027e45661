"""Generalised EM with a sampled latent variable: sample, score, weigh, fit, and what the fit has gained.

For a question x, a latent z (a search trajectory, a permutation of passages) and an answer y,

    log p(y|x) = log sum_z p(z|x) p(y|x,z) >= E_q[log p(z,y|x)] + H(q).

An iteration draws z_1 .. z_m from p(z|x), the model's own prior (sample), takes l_k = log p(y|x,z_k) of the gold answer
(score), turns these into weights w_k that stand for the posterior p(z|x,y) (weigh: :mod:`mobula.rag.weights`), and
raises Q = sum_k w_k log p(z_k,y|x) by gradient steps (fit); ``q_gain`` is by how much (Shi et al., arXiv 2505.20128 and
2505.03075). A method brings a :class:`Latent`, its latent variable under given weights of its networks, and an
:class:`EM`, what is learned from weighted samples; the phases, their files and their checks stand here once.
"""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from mobula.alternation import Context, History, Loop, Phase, Row, Sharded, Step
from mobula.artifacts import write_json, write_jsonl
from mobula.config import key, section
from mobula.errors import MobulaError
from mobula.portable import Portable
from mobula.rag.objective import check_q_gain
from mobula.rag.weights import BY_LIKELIHOOD, Sampled, WeightConfig, Weights, weigh

SAMPLE, SCORE, WEIGH, FIT, Q_GAIN = "sample", "score", "weigh", "fit", "q_gain"
STATE, WEIGHTS = "state.json", "weights.jsonl"
ALIKE = 0.05  # from which share of one another samples and weights count as all alike
log = logging.getLogger(__name__)

Checkpoint = dict[str, Path]  # where the weights of each network are, by the network's name


class SnapshotMismatch(MobulaError):
    """Samples of other weights than those that are to score them."""


class EqualWeights(MobulaError):
    """Weights that prefer nothing."""


@dataclass
class EmConfig:
    """The E-step, and what is asked of an M-step."""

    RENAMED: ClassVar = {"min_gap": "min_q_gain"}
    samples: int = key(4, "latents sampled a question (m)", ge=1, le=1000)
    weights: WeightConfig = section(WeightConfig)
    min_q_gain: float = key(-0.5, "an M-step that raises its own objective by less, in nats a question, is an error")


class Latent(Protocol):
    """A latent variable z under given weights of its networks. Picklable; opens the networks on first use.

    Rows are JSON, one a question, and depend on their question and seed alone, never on what else is in a batch.
    """

    @property
    def snapshot(self) -> str:
        """Identity of the weights."""
        ...

    def sample(self, questions: Sequence[Row], seed: int) -> list[Row]:
        """m draws from p(z|x) a question: rows ``{query, ...}``. A question's seed is made of ``seed`` and its id."""
        ...

    def score(self, samples: Sequence[Row]) -> list[Row]:
        """What each question's m samples are worth: rows with at least these columns.

        ``query``; ``log_lik`` [m], log p(y|x,z) of the gold answer, summed over its ``answer_tokens`` tokens, or null
        where a sample has none; ``em`` and ``reward`` [m] of the sample's own answer; ``log_ratio`` [m], log p(z|x)
        minus the log-probability that z was drawn with; ``distinct``, how many of the samples are different.
        """
        ...


@dataclass(frozen=True)
class Weighted:
    """A question's samples with their scores and weights."""

    sample: Row
    score: Row
    weights: Weights


@dataclass
class SampleWorker(Portable):
    """Questions to samples, with the snapshot that drew them; ``seed`` is that of the phase, whatever the shard."""

    latent: Latent
    seed: int

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.cluster.pool.Worker`; the shard's seed is not used."""
        return [{**row, "snapshot": self.latent.snapshot} for row in self.latent.sample(items, self.seed)]


@dataclass
class ScoreWorker(Portable):
    """Samples to scores."""

    latent: Latent

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.cluster.pool.Worker`; nothing is drawn.

        Raises:
            SnapshotMismatch: for samples of other weights.
        """
        own = self.latent.snapshot
        if others := {item["snapshot"] for item in items} - {own}:
            raise SnapshotMismatch(f"samples of {', '.join(sorted(others))} cannot be scored by {own}")
        return self.latent.score(items)


class EM(Portable, ABC):
    """One arm and seed of a method that learns by generalised EM.

    ``longer``: the key that lets an M-step train for longer. ``shard``: questions that are worked on at a time.
    ``draws_samples``: m samples of every question are drawn (false: the arm is given its latents).
    """

    longer: ClassVar[str] = "fit.steps"
    shard: int = 64
    draws_samples: bool = True

    @property
    @abstractmethod
    def em(self) -> EmConfig:
        """The E-step of the arm."""

    @property
    @abstractmethod
    def start(self) -> Checkpoint:
        """The weights before the first iteration."""

    @abstractmethod
    def identity(self) -> str:
        """Names all that decides the result."""

    @abstractmethod
    def latent(self, checkpoint: Checkpoint, split: str) -> Latent:
        """The latent variable of a split's questions under a checkpoint."""

    @abstractmethod
    def questions(self, split: str) -> list[Row]:
        """The questions of a split as :meth:`Latent.sample` gets them: without answers."""

    def with_answers(self, samples: list[Row], split: str) -> list[Row]:
        """Samples as :meth:`Latent.score` gets them; by default as they are."""
        return samples

    def accepted(self, score: Row) -> list[bool]:
        """Which samples of a question may have a weight; by default all. The others leave before normalisation."""
        return [True] * len(score["log_lik"])

    @abstractmethod
    def rows(self, weighted: Sequence[Weighted], checkpoint: Checkpoint, directory: Path) -> None:
        """Write the M-step's training data into ``directory``; questions without weights are not among them."""

    @abstractmethod
    def fit(self, data: Path, checkpoint: Checkpoint, context: Context) -> tuple[Checkpoint, Row]:
        """The M-step: weights trained in ``context.directory`` from what :meth:`rows` wrote into ``data``, and facts.

        A network that learns nothing keeps the weights of ``checkpoint``.
        """

    @abstractmethod
    def q_gain(self) -> Phase | None:
        """The phase named :data:`Q_GAIN` that measures by how much the M-step has raised Q; None: Q is not raised."""

    def gains(self, history: History) -> Row:
        """What that phase has found, ``q_gain...`` in nats a question; empty where nothing was trained."""
        return history.facts(Q_GAIN)

    @abstractmethod
    def evaluation(self) -> list[Phase]:
        """The phases that look at dev questions, after every iteration and before the first."""

    @abstractmethod
    def measures(self, history: History) -> Row:
        """What they have found, for the row of an iteration."""

    def facts(self, scores: Sequence[Row]) -> Row:
        """Further columns about samples; none by default."""
        return {}

    def loop(self) -> Loop:
        """The phases of the arm."""
        sample = self.sampling(SAMPLE, "train")
        score = self.scoring(SCORE, sample, "train")
        phases: list[Phase] = [sample, score, Step(WEIGH, self._weigh), Step(FIT, self._fit)]
        gain, evaluation = self.q_gain(), self.evaluation()
        if gain is not None:
            phases.append(gain)
        return Loop(self.identity(), evaluation, [*phases, *evaluation], self._row)

    def sampling(self, name: str, split: str, seeded_as: str = "") -> Sharded:
        """A phase that samples latents of a split's questions."""

        def worker(context: Context) -> SampleWorker:
            return SampleWorker(self.latent(self.current_checkpoint(context.history), split), context.seed)

        return Sharded(name, lambda context: self.questions(split), worker, self.shard, seeded_as)

    def scoring(self, name: str, sampling: Phase, split: str) -> Sharded:
        """A phase that scores what ``sampling`` has drawn."""

        def items(context: Context) -> list[Row]:
            return self.with_answers(context.history.rows(sampling.name), split)

        def worker(context: Context) -> ScoreWorker:
            return ScoreWorker(self.latent(self.current_checkpoint(context.history), split))

        return Sharded(name, items, worker, self.shard)

    def current_checkpoint(self, history: History) -> Checkpoint:
        """The weights that the last M-step left."""
        directory = history.latest(FIT)
        return self.start if directory is None else read_state(directory)

    def weights(self, score: Row) -> Weights:
        """The weights of a question's samples."""
        finite = zip(score["log_lik"], self.accepted(score), strict=True)
        log_lik = np.array([-np.inf if value is None or not kept else value for value, kept in finite], dtype=float)
        ratio, reward, exact = (np.array(score[name], dtype=float) for name in ("log_ratio", "reward", "em"))
        return weigh(Sampled(log_lik, score["answer_tokens"], ratio, reward, exact), self.em.weights)

    def sample_facts(self, scores: Sequence[Row]) -> Row:
        """Columns about a split's samples: their bound, exact match, and how much they differ."""
        return {**sample_facts(scores, [self.weights(score) for score in scores]), **self.facts(scores)}

    def _weigh(self, context: Context) -> Row:
        history = context.history
        samples, scores = history.rows(SAMPLE), history.rows(SCORE)
        weights = [self.weights(score) for score in scores]
        write_jsonl(context.directory / WEIGHTS, (_row_of(s["query"], w) for s, w in zip(scores, weights, strict=True)))
        weighted = [Weighted(*parts) for parts in zip(samples, scores, weights, strict=True)]
        self.rows(weighted, self.current_checkpoint(history), context.directory)
        facts = {**self.sample_facts(scores), **weight_facts(weights)}
        if self.draws_samples:
            check_samples(scores, self.em.samples)
        check_weights(weighted, self.em, facts)
        return facts

    def _fit(self, context: Context) -> Row:
        data = context.history.latest(WEIGH)
        assert data is not None
        checkpoint = self.current_checkpoint(context.history)
        trained, facts = self.fit(data, checkpoint, context)
        if trained == checkpoint:
            log.warning("iteration %d: no question has a weight, so nothing is learned", context.iteration)
        write_state(context.directory, trained)
        return facts

    def _row(self, history: History, iteration: int) -> Row:
        """The row of metrics of an iteration.

        Raises:
            MStepFailed: if the training lowered its own objective by more than ``em.min_q_gain``.
        """
        row = self.measures(history)
        if not iteration:
            return row
        gains = self.gains(history) if history.ran(Q_GAIN) else {}
        for name, value in gains.items():
            if name.startswith(Q_GAIN):
                check_q_gain(value, self.em.min_q_gain, f"iteration {iteration}, {name}", self.longer)
        return {**row, **history.facts(WEIGH), **history.facts(FIT), **gains}


def sample_facts(scores: Sequence[Row], weights: Sequence[Weights]) -> Row:
    """What samples are like, mean over questions.

    ``iwae_bound``: log (1/m) sum_k p(y|x,z_k), in expectation a lower bound of log p(y|x) that rises with m (Burda et
    al. 2016). ``all_fail``: share of questions whose best sample makes the answer unlikely. ``distinct_fraction``: of
    m. ``variance``: of p(y|x,z_k) over k. ``sample_em``: exact match of the samples' own answers.
    """
    bounds = [each.log_mean_lik for each in weights if np.isfinite(each.log_mean_lik)]
    likelihoods = [np.exp([value for value in score["log_lik"] if value is not None]) for score in scores]
    return {
        "iwae_bound": float(np.mean(bounds)) if bounds else 0.0,
        "all_fail": float(np.mean([each.all_fail for each in weights])),
        "distinct_fraction": float(np.mean([score["distinct"] / len(score["log_lik"]) for score in scores])),
        "variance": float(np.mean([np.var(values) for values in likelihoods if len(values)])),
        "sample_em": column_mean(scores, "em"),
    }


def weight_facts(weights: Sequence[Weights]) -> Row:
    """Of questions with weights: how many, their effective sample size, and the largest weight, mean of questions."""
    kept = [each for each in weights if not each.skipped]
    return {
        "queries": len(kept),
        "skipped": len(weights) - len(kept),
        "ess": float(np.mean([each.ess for each in kept])) if kept else 0.0,
        "largest": float(np.mean([each.values.max() for each in kept])) if kept else 0.0,
    }


def column_mean(scores: Sequence[Row], column: str) -> float:
    """The mean of a column over all samples of all questions."""
    return float(np.mean([value for score in scores for value in score[column]]))


def check_samples(scores: Sequence[Row], samples: int) -> None:
    """Check that no sample was lost.

    Raises:
        EqualWeights: if a question has fewer than m.
    """
    fewest = min(len(score["log_lik"]) for score in scores)
    if fewest < samples:
        raise EqualWeights(f"em.samples={samples} were drawn of every question, {fewest} are left of one")


def check_weights(weighted: Sequence[Weighted], em: EmConfig, facts: Row) -> None:
    """Refuse weights by likelihood that say nothing, and warn of samples that do.

    Raises:
        EqualWeights: no question prefers one of its different samples to another.
    """
    varied = [each for each in weighted if not each.weights.skipped and each.score["distinct"] > 1]
    equal = all(len(set(each.weights.values.tolist())) == 1 for each in varied)
    if em.weights.rule in BY_LIKELIHOOD and varied and equal:
        rule = em.weights.rule
        raise EqualWeights(f"rule {rule} gave all samples of every question the same weight; were scores lost?")
    alike = facts["distinct_fraction"] <= 1 / em.samples + ALIKE and facts["ess"] >= (1 - ALIKE) * em.samples
    if em.samples > 1 and alike:
        log.warning("the sampler has collapsed: nearly all %d samples of a question are alike", em.samples)


def write_state(directory: Path, checkpoint: Checkpoint) -> None:
    """Name a checkpoint in a phase's directory, by relative paths, so that a run can be moved."""
    base = directory.resolve()
    write_json(directory / STATE, {name: os.path.relpath(path.resolve(), base) for name, path in checkpoint.items()})


def read_state(directory: Path) -> Checkpoint:
    """What :func:`write_state` wrote."""
    names = json.loads((directory / STATE).read_text(encoding="utf-8"))
    return {name: (directory / path).resolve() for name, path in names.items()}


def _row_of(query: str | int, weights: Weights) -> Row:
    return {
        "query": query,
        "weights": weights.values.tolist(),
        "ess": weights.ess,
        "log_mean_lik": weights.log_mean_lik,
        "all_fail": bool(weights.all_fail),
        "skipped": weights.skipped,
    }
