"""The EM core on a latent that is drawn from a table: phases, weights, checks, and a likelihood that rises."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobula import alternation
from mobula.alternation import AlternationConfig, Context, History, Outcome, Phase, Row, Step, seed_of
from mobula.artifacts import read_jsonl, write_json
from mobula.rag.em import (
    EM,
    FIT,
    Q_GAIN,
    SAMPLE,
    STATE,
    WEIGH,
    WEIGHTS,
    Checkpoint,
    EmConfig,
    EqualWeights,
    SampleWorker,
    ScoreWorker,
    SnapshotMismatch,
    Weighted,
    check_samples,
    check_weights,
    read_state,
)
from mobula.rag.objective import MStepFailed
from mobula.rag.weights import WeightConfig, Weights

LATENTS, QUESTIONS = 6, 40
LIKELIHOOD = np.log([0.9, 0.5, 0.2, 0.1, 0.05, 0.01])  # log p(y|x,z), the same for every question


@dataclass
class Table:
    """p(z|x) from a file, the same for every question."""

    file: Path
    samples: int

    @property
    def probabilities(self) -> np.ndarray:
        return np.array(json.loads(self.file.read_text()))

    @property
    def snapshot(self) -> str:
        return self.file.read_text()

    def sample(self, questions: Sequence[Row], seed: int) -> list[Row]:
        rngs = [np.random.default_rng(seed_of(seed, question["query"])) for question in questions]
        return [
            {"query": q["query"], "latents": rng.choice(LATENTS, self.samples, p=self.probabilities).tolist()}
            for q, rng in zip(questions, rngs, strict=True)
        ]

    def score(self, samples: Sequence[Row]) -> list[Row]:
        zeros = [0.0] * self.samples
        return [
            {
                "query": sample["query"],
                "log_lik": LIKELIHOOD[sample["latents"]].tolist(),
                "answer_tokens": 1,
                "em": [float(z == 0) for z in sample["latents"]],
                "reward": zeros,
                "log_ratio": zeros,
                "distinct": len(set(sample["latents"])),
            }
            for sample in samples
        ]


@dataclass
class TableEM(EM):
    """Its M-step is exact, with a count added to every latent. ``worse``: it learns the opposite."""

    base: Path
    config: EmConfig = field(default_factory=EmConfig)
    worse: bool = False
    shard = 16

    @property
    def em(self) -> EmConfig:
        return self.config

    @property
    def start(self) -> Checkpoint:
        return {"table": self.base}

    def identity(self) -> str:
        return "table"

    def latent(self, checkpoint: Checkpoint, split: str) -> Table:
        return Table(checkpoint["table"], self.em.samples)

    def questions(self, split: str) -> list[Row]:
        return [{"query": number} for number in range(QUESTIONS)]

    def rows(self, weighted: Sequence[Weighted], checkpoint: Checkpoint, directory: Path) -> None:
        counts = np.zeros(LATENTS)
        for each in weighted:
            np.add.at(counts, each.sample["latents"], each.weights.values)
        write_json(directory / "counts.json", counts.tolist())

    def fit(self, data: Path, checkpoint: Checkpoint, context: Context) -> tuple[Checkpoint, Row]:
        counts = np.array(json.loads((data / "counts.json").read_text())) + 1
        counts = 1 / counts if self.worse else counts
        write_json(context.directory / "table.json", (counts / counts.sum()).tolist())
        return {"table": context.directory / "table.json"}, {"steps": 1}

    def q_gain(self) -> Phase:
        return Step(Q_GAIN, self._gain)

    def _gain(self, context: Context) -> Row:
        history, data = context.history, context.history.latest(WEIGH)
        assert data is not None
        counts = np.array(json.loads((data / "counts.json").read_text()))
        checkpoints = (self.current_checkpoint(h) for h in (history.until(context.iteration - 1), history))
        old, new = (float(counts @ np.log(self.latent(each, "train").probabilities)) for each in checkpoints)
        return {"q_gain": (new - old) / QUESTIONS}

    def evaluation(self) -> list[Phase]:
        return []

    def measures(self, history: History) -> Row:
        table = self.latent(self.current_checkpoint(history), "dev")
        return {"log_p": float(np.log(table.probabilities @ np.exp(LIKELIHOOD)))}


@pytest.fixture
def em(tmp_path: Path) -> TableEM:
    write_json(tmp_path / "uniform.json", [1 / LATENTS] * LATENTS)
    return TableEM(tmp_path / "uniform.json", EmConfig(samples=8))


def run(em: TableEM, directory: Path, iterations: int = 3) -> Outcome:
    config = AlternationConfig(iterations=iterations, actors=0)
    return alternation.run(em.loop(), config, directory, seed=0)


def test_the_likelihood_rises_and_every_column_is_there(em: TableEM, tmp_path: Path) -> None:
    rows = run(em, tmp_path / "run").rows
    assert [one["log_p"] < other["log_p"] for one, other in pairwise(rows)] == [True] * 3
    assert all(row["q_gain"] > 0 for row in rows[1:])
    names = {
        "iwae_bound",
        "all_fail",
        "distinct_fraction",
        "variance",
        "sample_em",
        "queries",
        "skipped",
        "ess",
        "largest",
    }
    assert names <= set(rows[1]) and rows[1]["steps"] == 1
    # The bound of m samples is below log p(y|x) before the M-step, and rises with it.
    assert rows[1]["iwae_bound"] < rows[0]["log_p"] + 0.1
    assert rows[3]["iwae_bound"] > rows[1]["iwae_bound"]


def test_weights_are_those_of_the_samples_that_were_drawn(em: TableEM, tmp_path: Path) -> None:
    history = run(em, tmp_path / "run", 1).history
    weights = read_jsonl(history.latest(WEIGH) / WEIGHTS)  # type: ignore[operator]
    for sample, row in zip(history.rows(SAMPLE), weights, strict=True):
        likelihood = np.exp(LIKELIHOOD[sample["latents"]])
        assert row["query"] == sample["query"]
        assert row["weights"] == pytest.approx(likelihood / likelihood.sum())


def test_a_moved_run_finds_its_weights(em: TableEM, tmp_path: Path) -> None:
    directory = run(em, tmp_path / "run", 1).history.latest(FIT)
    assert directory is not None
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run", moved)
    path = moved / directory.relative_to(tmp_path / "run")
    assert read_state(path) == {"table": path / "table.json"}
    assert not Path(json.loads((path / STATE).read_text())["table"]).is_absolute()


def test_an_m_step_that_lowers_its_objective_is_an_error(em: TableEM, tmp_path: Path) -> None:
    with pytest.raises(MStepFailed, match=r"iteration 1, q_gain.*em\.min_q_gain=-0\.5"):
        run(replace(em, worse=True), tmp_path / "run")
    run(replace(em, worse=True, config=replace(em.config, min_q_gain=-100.0)), tmp_path / "allowed", 1)


def test_samples_of_other_weights_are_refused(em: TableEM, tmp_path: Path) -> None:
    drawn = SampleWorker(em.latent(em.start, "train"), 0).process(em.questions("train")[:3], 5)
    assert ScoreWorker(em.latent(em.start, "train")).process(drawn, 0)
    write_json(tmp_path / "other.json", [1.0, *[0.0] * (LATENTS - 1)])
    with pytest.raises(SnapshotMismatch, match="cannot be scored"):
        ScoreWorker(Table(tmp_path / "other.json", 8)).process(drawn, 0)


def test_samples_do_not_depend_on_the_shard(em: TableEM) -> None:
    worker, questions = SampleWorker(em.latent(em.start, "train"), 3), em.questions("train")[:4]
    assert worker.process(questions, 0) == [worker.process([question], 9)[0] for question in questions]


def weighted(values: Sequence[Sequence[float]], distinct: int = 2, skipped: str = "") -> list[Weighted]:
    return [Weighted({}, {"distinct": distinct}, Weights(np.array(v), 1.0, -1.0, False, skipped)) for v in values]


FACTS = {"distinct_fraction": 1.0, "ess": 1.0}


@pytest.mark.parametrize("rule", ["snis", "unnormalised"])
def test_likelihoods_that_prefer_nothing_are_refused(rule: str) -> None:
    config = EmConfig(samples=2, weights=WeightConfig(rule=rule))
    with pytest.raises(EqualWeights, match=f"{rule} gave all samples"):
        check_weights(weighted([[0.5, 0.5]] * 3), config, FACTS)
    check_weights(weighted([[0.5, 0.5], [0.4, 0.6]]), config, FACTS)
    check_weights(weighted([[0.5, 0.5]], distinct=1), config, FACTS)
    check_weights(weighted([[0.5, 0.5]], skipped="every sample fails"), config, FACTS)


@pytest.mark.parametrize("rule", ["uniform", "binary", "reward"])
def test_rewards_may_be_all_equal(rule: str) -> None:
    check_weights(weighted([[0.5, 0.5]]), EmConfig(samples=2, weights=WeightConfig(rule=rule)), FACTS)


def test_a_lost_sample_is_refused() -> None:
    check_samples([{"log_lik": [-1.0, -2.0]}], 2)
    with pytest.raises(EqualWeights, match=r"em\.samples=2 were drawn of every question, 1 are left"):
        check_samples([{"log_lik": [-1.0, -2.0]}, {"log_lik": [-1.0]}], 2)


@pytest.mark.parametrize(("facts", "warned"), [((0.27, 3.9), True), ((0.5, 3.9), False), ((0.27, 2.0), False)])
def test_a_sampler_that_has_collapsed_is_told(
    facts: tuple[float, float], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        names: dict[str, Any] = dict(zip(("distinct_fraction", "ess"), facts, strict=True))
        check_weights(weighted([[0.2, 0.8]]), EmConfig(samples=4), names)
    assert ("collapsed" in caplog.text) == warned
