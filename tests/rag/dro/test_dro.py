"""DRO in its world: what networks and rows refer to, which network learns, and a run from beginning to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mobula import artifacts, methods
from mobula.alternation import Row
from mobula.artifacts import read_jsonl, sha256, write_jsonl
from mobula.config import build
from mobula.errors import ConfigError
from mobula.rag.dro.comparison import Comparison
from mobula.rag.dro.config import COLD, Config
from mobula.rag.dro.facts.networks import Generator, Selector, Shape
from mobula.rag.dro.facts.source import Facts
from mobula.rag.dro.facts.training import Split, WeightedTask
from mobula.rag.dro.facts.world import ENTITIES, ORDERS, questions
from mobula.rag.dro.loop import EqualWeights, SampleWorker, ScoreWorker, _check
from mobula.rag.dro.pair import SnapshotMismatch
from mobula.rag.dro.trial import train_trial
from mobula.rag.weights import WeightConfig
from mobula.running import run_experiment

CONFIG: dict[str, Any] = {
    "method": "dro",
    "name": "tiny",
    "arms": ["dro", "generator_only", "m_1"],
    "data": {"labelled": 200, "train": 120, "dev": 60, "test": 80},
    "model": {"selector_width": 16, "generator_width": 16, "layers": 1},
    "cold": {"selector_steps": 30, "generator_steps": 20},
    "em": {"samples": 4},
    "fit": {"steps": 6, "batch": 32},
    "alternation": {"iterations": 2, "actors": 0, "monitor": "dev_em"},
    "evaluation": {"decisive": False, "resamples": 200, "redraws": 8},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in(tmp_path_factory.mktemp("dro") / "run")


def run_in(directory: Path) -> Path:
    path = directory.with_name("experiment.yaml")
    path.write_text(yaml.safe_dump(CONFIG))
    run_experiment(path, [], directory)
    return directory


def comparison(directory: Path) -> Comparison:
    return Comparison(build(Config, CONFIG), directory)


def rows(directory: Path, arm: str = "dro") -> list[Row]:
    return [{**row, "seconds": 0} for row in read_jsonl(directory / "seed-0" / arm / "iterations.jsonl")]


def weights_of(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): sha256(p) for p in (directory / "seed-0").rglob("*.safetensors")}


def test_a_question_is_answered_by_its_gold_facts_and_no_other_pair() -> None:
    drawn = questions(300, 0)
    gold = drawn.context(drawn.gold.unsqueeze(1)).squeeze(1)
    assert torch.equal(gold[:, 0, 0], drawn.asked[:, 0])
    assert torch.equal(gold[:, 0, 1], drawn.asked[:, 1])
    assert torch.equal(gold[:, 0, 2], gold[:, 1, 0])
    assert torch.equal(gold[:, 1, 1], drawn.asked[:, 2])
    assert torch.equal(gold[:, 1, 2], drawn.answers)
    chains = drawn.context(torch.arange(len(ORDERS)).expand(len(drawn), -1))
    links = (chains[:, :, 0, :2] == drawn.asked[:, None, :2]).all(-1) & (chains[:, :, 0, 2] == chains[:, :, 1, 0])
    assert (links & (chains[:, :, 1, 1] == drawn.asked[:, None, 2])).sum(-1).eq(1).all()
    assert int(drawn.answers.max()) < ENTITIES


def test_where_gold_facts_stand_says_nothing_and_splits_differ() -> None:
    drawn = questions(3000, 0)
    counts = np.bincount(drawn.gold.numpy(), minlength=len(ORDERS))
    assert counts.min() > 60
    config = build(Config, CONFIG)
    seeds = {Facts(config).split(name).seed for name in ("labelled", "train", "dev", "test")}
    assert len(seeds) == 4


def test_orders_refer_to_facts_as_they_are_shown() -> None:
    drawn = questions(40, 1)
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    other = replace(drawn, facts=drawn.facts[:, shuffled])
    place = {int(old): new for new, old in enumerate(shuffled)}
    mapped = [ORDERS.tolist().index([place[i] for i in pair]) for pair in ORDERS[drawn.gold].tolist()]
    assert torch.equal(drawn.context(drawn.gold[:, None]), other.context(torch.tensor(mapped)[:, None]))


def test_all_orders_together_have_probability_one_and_none_repeats_a_fact() -> None:
    drawn = questions(20, 2)
    torch.manual_seed(0)
    steps = Selector(Shape())(drawn.asked, drawn.facts).double()
    assert steps.shape == (20, 30, 2)
    torch.testing.assert_close(steps.sum(-1).exp().sum(-1), torch.ones(20).double(), atol=1e-5, rtol=0)
    assert len({tuple(pair) for pair in ORDERS.tolist()}) == 30
    assert all(a != b for a, b in ORDERS.tolist())


def test_the_generator_reads_its_context_alone() -> None:
    """Nothing of the six facts but the two chosen ones reaches it."""
    drawn = questions(10, 3)
    torch.manual_seed(0)
    generator = Generator(Shape()).eval()
    context = drawn.context(drawn.gold[:, None])
    together = generator(drawn.asked, torch.cat([context, drawn.context(torch.zeros(10, 1).long())], 1))
    torch.testing.assert_close(generator(drawn.asked, context), together[:, :1])


@pytest.mark.parametrize("kind", ["selector", "generator"])
def test_weights_decide_what_is_learned(tmp_path: Path, kind: str) -> None:
    """Weight 0 teaches nothing, and a row's weight scales its gradient."""
    data = tmp_path / "weights.jsonl"

    def gradient(weights: list[float]) -> torch.Tensor:
        write_jsonl(data, [{"query": q, "orders": [3, 7], "weights": weights} for q in range(4)])
        task = WeightedTask(kind, Shape(1, 16, 4), Split(4, 0), data, None, 0)
        model = task.build()
        task.loss(model, task.batch(torch.arange(4), torch.Generator()))[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    first, second, both = gradient([1.0, 0.0]), gradient([0.0, 1.0]), gradient([0.25, 0.75])
    assert gradient([0.0, 0.0]).abs().max() == 0
    torch.testing.assert_close(0.25 * first + 0.75 * second, both, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(first, second)


def test_a_run_leaves_its_report_and_an_artifact_that_answers(directory: Path) -> None:
    report = json.loads((directory / "report.json").read_text())
    assert {"cold_start/exact", "dro/exact", "generator_only/log_p"} <= set(report["measures"])
    assert [row["iteration"] for row in rows(directory)] == [0, 1, 2]
    assert "m_1: no signal, one sample has weight 1 whatever its likelihood" in report["notes"]
    assert {"monotone", "dro - cold_start", "dro - generator_only"} <= {claim["name"] for claim in report["claims"]}
    predictor = methods.get("dro").load(artifacts.open_artifact(directory / "artifact"))
    orders, answers = predictor.answer(questions(5, 9))
    assert all(1 <= place <= 6 for order in orders for place in order)
    assert all(0 <= answer < ENTITIES for answer in answers)


def test_both_networks_learn_from_one_weights_file_or_only_the_one_that_the_arm_trains(directory: Path) -> None:
    whole = comparison(directory)
    cold, both, half = whole.start(0), whole.standing("dro", 0), whole.standing("generator_only", 0)
    fits = list((directory / "seed-0" / "generator_only").glob("*/*-fit"))
    assert len(fits) == 2
    assert all({p.name for p in fit.iterdir() if p.is_dir()} == {"generator"} for fit in fits)
    assert sha256(half.selector) == sha256(cold.selector)
    last = sorted((directory / "seed-0" / "dro").glob("*/*-fit"))[-1]
    assert {p.name for p in last.iterdir() if p.is_dir()} == {"selector", "generator"}
    assert both.snapshot != cold.snapshot


def test_weights_of_a_query_sum_to_one_and_follow_its_likelihoods(directory: Path) -> None:
    loop = directory / "seed-0" / "dro" / "iteration-001"
    (weighed,) = loop.glob("*-weigh/weights.jsonl")
    (scored,) = loop.glob("*-score/shard-00000.jsonl")
    scores = {row["query"]: row["log_lik"] for row in read_jsonl(scored)}
    for row in read_jsonl(weighed):
        assert sum(row["weights"]) == pytest.approx(1)
        assert np.argmax(row["weights"]) == np.argmax(scores[row["query"]])


def test_the_same_run_again_has_the_same_numbers_and_weights(directory: Path, tmp_path: Path) -> None:
    again = run_in(tmp_path / "run")
    assert rows(again) == rows(directory)
    assert weights_of(again) == weights_of(directory)


def test_a_trial_reports_every_iteration_and_shares_its_cold_start(directory: Path, tmp_path: Path) -> None:
    config = build(Config, CONFIG)
    told: list[dict[str, Any]] = []
    train_trial(config, tmp_path / "one", told.append)
    assert told == [{n: v for n, v in row.items() if n == "iteration" or n[:4] == "dev_"} for row in rows(directory)]
    shared = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*.safetensors")}
    config.em.samples, config.alternation.iterations = 2, 1
    train_trial(config, tmp_path / "two", told.append)
    train_trial(config, tmp_path / "two", told.append)  # finished: it tells its last row once more
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*.safetensors")} == shared
    assert [row["iteration"] for row in told[3:]] == [0, 1, 1]


def test_samples_of_other_networks_are_refused(directory: Path) -> None:
    whole = comparison(directory)
    setting, history = whole.setting("dro", 0), whole.outcome("dro", 0).history
    items = [{"query": q} for q in range(10)]
    drawn = SampleWorker(setting, history, 4).process(items, 1)
    assert ScoreWorker(setting, history).process(drawn, 0)
    with pytest.raises(SnapshotMismatch, match="cannot be scored by"):
        ScoreWorker(setting, history.until(0)).process(drawn, 0)


def test_a_sample_depends_on_its_question_and_seed_alone(directory: Path) -> None:
    whole = comparison(directory)
    setting, history = whole.setting("dro", 0), whole.outcome("dro", 0).history
    together = SampleWorker(setting, history, 4).process([{"query": q} for q in range(10)], 1)
    alone = SampleWorker(setting, history, 4).process([{"query": 7}], 1)
    assert alone == [together[7]]
    assert "answer" not in json.dumps(together)


def test_weights_that_prefer_nothing_are_refused() -> None:
    equal = [{"query": 0, "orders": [1, 2], "weights": [0.5, 0.5]}]
    with pytest.raises(EqualWeights, match="lik_softmax gave all samples"):
        _check(WeightConfig(), equal, equal)
    _check(WeightConfig(rule="uniform"), equal, equal)


def test_a_collapsed_sampler_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    same = [{"query": 0, "orders": [4, 4, 4], "weights": [1 / 3] * 3}]
    _check(WeightConfig(), same, same)
    assert "the sampler has collapsed: all 3 samples" in caplog.text


def test_measures_are_greedy_and_exact(directory: Path) -> None:
    whole = comparison(directory)
    networks = Facts(whole.config).open(whole.standing(COLD, 0))
    drawn = questions(50, 4)
    found = networks.measured(drawn)
    assert found["exact"].tolist() == networks.measured(drawn)["exact"].tolist()
    brute = np.log((networks.log_prior(drawn).exp() * networks.log_lik(drawn).exp()).sum(-1).numpy())
    assert found["log_p"] == pytest.approx(brute)


def test_nothing_is_known_by_heart(directory: Path) -> None:
    """Without either gold fact, answers are right as often as by chance among the symbols of the facts."""
    whole = comparison(directory)
    networks = Facts(whole.config).open(whole.standing("dro", 0))
    drawn = whole.source.split("train").draw()  # type: ignore[attr-defined]
    gold = ORDERS[drawn.gold]
    others = (ORDERS[None] != gold[:, :1, None]).all(-1) & (ORDERS[None] != gold[:, 1:, None]).all(-1)
    assert others.sum(1).eq(12).all()
    _, right = networks.judged(drawn, torch.arange(len(ORDERS)).expand(len(drawn), -1))
    assert float(right[others].double().mean()) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["dr"]}, "arms: unknown 'dr'"),
        ({"arms": []}, "arms is empty"),
        ({"parallel": 2, "alternation": {"actors": 1}}, "parallel=2 needs alternation.actors=0"),
        ({"model": {"selector_width": 18}}, "model.selector_width=18 does not divide"),
        ({"em": {"weights": {"rule": "nll"}}}, "rule=nll is unknown"),
        ({"em": {"weights": {"correction": "exact"}}}, "there is nothing to correct"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        build(Config, {**CONFIG, **change})
