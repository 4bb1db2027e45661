"""DRO in its world: what networks and rows refer to, which network learns, and a run from beginning to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mobula import artifacts, methods
from mobula.alternation import Context, Row
from mobula.artifacts import read_jsonl, sha256, write_jsonl
from mobula.config import build
from mobula.errors import ConfigError
from mobula.evaluation.intervals import paired_difference
from mobula.rag.dro.comparison import Comparison
from mobula.rag.dro.config import ARMS, COLD, Config
from mobula.rag.dro.facts.networks import Generator, Selector, Shape
from mobula.rag.dro.facts.source import Facts
from mobula.rag.dro.facts.training import Split, WeightedTask
from mobula.rag.dro.facts.world import ENTITIES, ORDERS, questions
from mobula.rag.dro.loop import EqualWeights, SampleWorker, ScoreWorker, Setting, _check, _fit, _weigh
from mobula.rag.dro.pair import Pair, SnapshotMismatch
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


@pytest.mark.parametrize("kind", ["selector", "generator"])
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]]], ids=["halves", "single"])
def test_a_gradient_does_not_depend_on_micro_batches(tmp_path: Path, kind: str, parts: list[list[int]]) -> None:
    data = tmp_path / "weights.jsonl"
    weights = [[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8], [0.0, 0.6, 0.4]]
    write_jsonl(data, [{"query": q, "orders": [3, 7, q], "weights": w} for q, w in enumerate(weights)])
    task = WeightedTask(kind, Shape(1, 16, 4), Split(4, 0), data, None, 0)

    def gradient(parts: list[list[int]]) -> torch.Tensor:
        model = task.build().double()
        for part in parts:
            (task.loss(model, task.batch(torch.tensor(part), torch.Generator()))[0] / len(parts)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(parts), gradient([[0, 1, 2, 3]]), atol=1e-9, rtol=1e-6)


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
    drawn = SampleWorker(setting, history, 4, 1).process(items, 0)
    assert ScoreWorker(setting, history).process(drawn, 0)
    with pytest.raises(SnapshotMismatch, match="cannot be scored by"):
        ScoreWorker(setting, history.until(0)).process(drawn, 0)


def test_a_sample_depends_on_its_question_and_seed_alone(directory: Path) -> None:
    whole = comparison(directory)
    setting, history = whole.setting("dro", 0), whole.outcome("dro", 0).history
    together = SampleWorker(setting, history, 4, 1).process([{"query": q} for q in range(10)], 5)
    alone = SampleWorker(setting, history, 4, 1).process([{"query": 7}], 6)
    assert alone == [together[7]]
    assert "answer" not in json.dumps(together)


def test_networks_of_two_iterations_cannot_score_together(directory: Path) -> None:
    whole = comparison(directory)
    setting, history = whole.setting("dro", 0), whole.outcome("dro", 0).history
    drawn = SampleWorker(setting, history, 4, 1).process([{"query": 1}], 0)
    now, before = setting.standing(history), setting.standing(history.until(1))
    for mixed in (Pair(now.selector, before.generator), Pair(before.selector, now.generator)):
        with pytest.raises(SnapshotMismatch):
            ScoreWorker(replace(setting, cold=mixed), history.until(0)).process(drawn, 0)


def test_both_networks_learn_from_one_file_of_weights_and_only_those_that_an_arm_trains(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = comparison(directory)
    history = whole.outcome("dro", 0).history.until(1)
    weights = history.latest("weigh")
    assert weights is not None
    for arm in ("dro", "selector_only", "generator_only"):
        setting = replace(whole.setting("dro", 0), arm=ARMS[arm])
        learned: dict[str, str] = {}

        def spy(task: Any, config: Any, place: Path, *, seed: int, name: str) -> Any:
            learned[name] = sha256(task.data)  # noqa: B023
            return SimpleNamespace(weights=getattr(setting.cold, name))  # noqa: B023

        monkeypatch.setattr("mobula.rag.dro.loop.fit", spy)
        _fit(setting, Context(tmp_path, 1, 0, history, None))
        assert learned == dict.fromkeys(ARMS[arm].train, sha256(weights / "weights.jsonl"))


def test_weights_stay_those_of_the_networks_that_sampled(directory: Path, tmp_path: Path) -> None:
    """They follow from the scores alone: networks that have learned since do not change them."""
    whole = comparison(directory)
    history = whole.outcome("dro", 0).history.until(1)
    weights = history.latest("weigh")
    assert weights is not None
    _weigh(whole.setting("dro", 0), Context(tmp_path, 1, 0, history, None))
    assert (tmp_path / "weights.jsonl").read_bytes() == (weights / "weights.jsonl").read_bytes()


def test_questions_that_all_samples_fail_are_counted_and_those_alone_are_skipped(
    directory: Path, tmp_path: Path
) -> None:
    whole = comparison(directory)
    setting, history = whole.setting("dro", 0), whole.outcome("dro", 0).history.until(1)
    best = {row["query"]: max(row["log_lik"]) for row in history.rows("score")}
    middle = float(np.median(list(best.values())))
    setting.config.em.weights = WeightConfig(gate="skip", fail_eps=float(np.exp(middle)))
    facts = _weigh(setting, Context(tmp_path, 1, 0, history, None))
    kept = {query for query, value in best.items() if value >= middle}
    assert {row["query"] for row in read_jsonl(tmp_path / "weights.jsonl")} == kept
    assert (facts["queries"], facts["skipped"]) == (len(kept), len(best) - len(kept))
    assert facts["all_fail"] == pytest.approx(1 - len(kept) / len(best))


FACTS_OF = {"unique": 1.0, "ess": 1.0}


def setting_of(directory: Path, rule: str = "snis", samples: int = 2) -> Setting:
    setting = comparison(directory).setting("dro", 0)
    setting.config.em.weights, setting.config.em.samples = WeightConfig(rule=rule), samples
    return setting


def test_weights_that_prefer_nothing_are_refused(directory: Path) -> None:
    equal = [{"query": 0, "orders": [1, 2], "weights": [0.5, 0.5]}]
    with pytest.raises(EqualWeights, match="snis gave all samples"):
        _check(setting_of(directory), equal, equal, FACTS_OF)
    _check(setting_of(directory, "uniform"), equal, equal, FACTS_OF)


def test_questions_that_kept_one_sample_are_refused(directory: Path) -> None:
    """Then every weight is 1, whatever the likelihoods say."""
    one = [{"query": q, "orders": [q], "weights": [1.0]} for q in range(5)]
    with pytest.raises(EqualWeights, match=r"em\.samples=4 orders were drawn of every question, 1 are left"):
        _check(setting_of(directory, samples=4), one, one, FACTS_OF)
    _check(setting_of(directory, samples=1), one, one, FACTS_OF)
    _check(replace(setting_of(directory, samples=4), arm=ARMS["supervised"]), one, one, FACTS_OF)


@pytest.mark.parametrize(("different", "warned"), [(0, True), (1, True), (10, False)])
def test_a_sampler_that_is_nearly_collapsed_is_warned_of(
    directory: Path, caplog: pytest.LogCaptureFixture, different: int, warned: bool
) -> None:
    orders = [[4, 4, 4]] * (20 - different) + [[4, 4, 5]] * different
    rows = [{"query": q, "orders": found, "weights": [0.3, 0.3, 0.4]} for q, found in enumerate(orders)]
    facts = {"unique": float(np.mean([len(set(found)) / 3 for found in orders])), "ess": 2.95}
    _check(setting_of(directory, samples=3), rows, rows, facts)
    assert ("the sampler has collapsed: nearly all 3 samples" in caplog.text) == warned


def test_the_greedy_order_is_the_likeliest(directory: Path) -> None:
    whole = comparison(directory)
    networks = whole.source.open(whole.standing("dro", 0))
    prior, _ = networks.exact("dev", list(range(20)))
    assert networks.choose("dev", list(range(20)), "selector") == prior.argmax(-1).tolist()


def test_train_and_held_out_likelihoods_are_in_every_row(directory: Path) -> None:
    assert all({"train_log_p", "dev_log_p"} <= set(row) for row in rows(directory))


def test_where_facts_are_shown_leaves_exact_match_within_its_interval(directory: Path) -> None:
    whole, drawn = comparison(directory), questions(1000, 4)
    networks = Facts(whole.config).open(whole.standing("dro", 0))
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    place = {int(old): new for new, old in enumerate(shuffled)}
    gold = torch.tensor([ORDERS.tolist().index([place[i] for i in pair]) for pair in ORDERS[drawn.gold].tolist()])
    other = replace(drawn, facts=drawn.facts[:, shuffled], gold=gold)
    found = paired_difference(networks.measured(drawn)["exact"], networks.measured(other)["exact"])
    assert found.low <= 0 <= found.high


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
