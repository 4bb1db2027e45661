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
from mobula.data.worlds.two_hop import ENTITIES, FactQuestions, two_hop
from mobula.errors import ConfigError
from mobula.evaluation.intervals import paired_difference
from mobula.rag.dro.config import ARMS, COLD, KINDS, Config
from mobula.rag.dro.data import SPLITS, FactWorld
from mobula.rag.dro.dro import DRO
from mobula.rag.dro.networks import MStep, Networks, network_of
from mobula.rag.dro.networks.facts import PairReader
from mobula.rag.dro.study import Arms, train_trial
from mobula.rag.em import EqualWeights, SampleWorker, ScoreWorker, SnapshotMismatch, check_samples
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
    "fit": {"steps": 6, "batch": 32, "workers": 0},
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


def arms(directory: Path) -> Arms:
    return Arms(build(Config, CONFIG), directory)


def networks(directory: Path, arm: str = "dro") -> Networks:
    whole = arms(directory)
    return Networks.of(whole.questions, **whole.checkpoint(arm, 0))


@pytest.fixture
def world(tmp_path: Path) -> FactWorld:
    return FactWorld(build(Config, CONFIG), tmp_path)


def rows(directory: Path, arm: str = "dro") -> list[Row]:
    return [{**row, "seconds": 0} for row in read_jsonl(directory / "seed-0" / arm / "iterations.jsonl")]


def weights_of(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): sha256(p) for p in (directory / "seed-0").rglob("*.safetensors")}


def test_a_question_is_answered_by_its_gold_facts_and_no_other_pair(world: FactWorld) -> None:
    questions = two_hop(300, 0)
    gold = questions.context(questions.gold.unsqueeze(1)).squeeze(1)
    assert torch.equal(gold[:, 0, 0], questions.question[:, 0])
    assert torch.equal(gold[:, 0, 1], questions.question[:, 1])
    assert torch.equal(gold[:, 0, 2], gold[:, 1, 0])
    assert torch.equal(gold[:, 1, 1], questions.question[:, 2])
    assert torch.equal(gold[:, 1, 2], questions.answers)
    chains = questions.context(torch.tensor(world.permutations()).expand(len(questions), -1, -1))
    links = (chains[:, :, 0, :2] == questions.question[:, None, :2]).all(-1) & (
        chains[:, :, 0, 2] == chains[:, :, 1, 0]
    )
    assert (links & (chains[:, :, 1, 1] == questions.question[:, None, 2])).sum(-1).eq(1).all()
    assert int(questions.answers.max()) < ENTITIES


def test_where_gold_facts_stand_says_nothing_and_splits_differ(world: FactWorld) -> None:
    every, questions = world.permutations(), two_hop(3000, 0)
    counts = np.bincount([every.index(gold) for gold in questions.gold.tolist()], minlength=len(every))
    assert counts.min() > 60
    assert len({str(world.take(name, [0]).facts.tolist()) for name in SPLITS}) == 4


def shuffled(questions: FactQuestions) -> FactQuestions:
    """The same questions with their facts shown otherwise."""
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    position = torch.argsort(order)
    return replace(questions, facts=questions.facts[:, order], gold=position[questions.gold])


def test_permutations_refer_to_facts_as_they_are_shown() -> None:
    questions = two_hop(40, 1)
    other = shuffled(questions)
    assert not torch.equal(questions.gold, other.gold)
    assert torch.equal(questions.context(questions.gold[:, None]), other.context(other.gold[:, None]))


def test_all_permutations_together_have_probability_one_and_none_repeats_a_fact(world: FactWorld) -> None:
    every = world.permutations()
    log_prob = network_of("selector", world).log_prob(two_hop(20, 2), [every] * 20)
    assert log_prob.shape == (20, 30)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(20).double(), atol=1e-5, rtol=0)
    assert len({tuple(pair) for pair in every}) == 30
    assert all(a != b for a, b in every)


def test_the_generator_reads_its_context_alone() -> None:
    """Nothing of the six facts but the two chosen ones reaches it."""
    questions = two_hop(10, 3)
    torch.manual_seed(0)
    generator = PairReader(2, 48, 4).eval()
    context = questions.context(questions.gold[:, None])
    others = questions.context(torch.tensor([0, 1]).expand(10, 1, 2))
    together = generator(questions.question, torch.cat([context, others], 1))
    torch.testing.assert_close(generator(questions.question, context), together[:, :1])


def task_of(world: FactWorld, kind: str, file: Path) -> MStep:
    return MStep(network_of(kind, world), "train", file, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_decide_what_is_learned(world: FactWorld, tmp_path: Path, kind: str) -> None:
    """Weight 0 teaches nothing, and a row's weight scales its gradient."""
    data, every = tmp_path / "rows.jsonl", world.permutations()

    def gradient(weights: list[float]) -> torch.Tensor:
        rows = [{"query": q, "permutations": [every[3], every[7]], "weights": weights} for q in range(4)]
        write_jsonl(data, rows)
        task = task_of(world, kind, data)
        model = task.build()
        task.loss(model, task.batch(torch.arange(4), torch.Generator()))[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    first, second, both = gradient([1.0, 0.0]), gradient([0.0, 1.0]), gradient([0.25, 0.75])
    assert gradient([0.0, 0.0]).abs().max() == 0
    torch.testing.assert_close(0.25 * first + 0.75 * second, both, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]]], ids=["halves", "single"])
def test_a_gradient_does_not_depend_on_micro_batches(
    world: FactWorld, tmp_path: Path, kind: str, parts: list[list[int]]
) -> None:
    data, every = tmp_path / "rows.jsonl", world.permutations()
    weights = [[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8], [0.0, 0.6, 0.4]]
    rows = [{"query": q, "permutations": [every[3], every[7], every[q]], "weights": w} for q, w in enumerate(weights)]
    write_jsonl(data, rows)
    task = task_of(world, kind, data)

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
    chosen, answers = predictor.answer(two_hop(5, 9))
    assert all(1 <= number <= 6 for permutation in chosen for number in permutation)
    assert all(0 <= answer < ENTITIES for answer in answers)


def test_both_networks_learn_from_one_file_or_only_the_one_that_the_arm_trains(directory: Path) -> None:
    whole = arms(directory)
    cold, both, half = (whole.checkpoint(arm, 0) for arm in (COLD, "dro", "generator_only"))
    fits = list((directory / "seed-0" / "generator_only").glob("*/*-fit"))
    assert len(fits) == 2
    assert all({p.name for p in fit.iterdir() if p.is_dir()} == {"generator"} for fit in fits)
    assert sha256(half["selector"]) == sha256(cold["selector"])
    last = sorted((directory / "seed-0" / "dro").glob("*/*-fit"))[-1]
    assert {p.name for p in last.iterdir() if p.is_dir()} == {"selector", "generator"}
    assert all(sha256(both[kind]) != sha256(cold[kind]) for kind in KINDS)


def test_weights_of_a_query_sum_to_one_and_follow_its_likelihoods(directory: Path) -> None:
    loop = directory / "seed-0" / "dro" / "iteration-001"
    (weighed,) = loop.glob("*-weigh/permutations.jsonl")
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
    reported: list[dict[str, Any]] = []
    train_trial(config, tmp_path / "one", reported.append)
    of_dev = [{n: v for n, v in row.items() if n == "iteration" or n[:4] == "dev_"} for row in rows(directory)]
    assert reported == of_dev
    shared = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*.safetensors")}
    config.em.samples, config.alternation.iterations = 2, 1
    train_trial(config, tmp_path / "two", reported.append)
    train_trial(config, tmp_path / "two", reported.append)  # finished: it reports its last row once more
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*.safetensors")} == shared
    assert [row["iteration"] for row in reported[3:]] == [0, 1, 1]


def workers(em: DRO, checkpoint: Any) -> tuple[SampleWorker, ScoreWorker]:
    latent = em.latent(checkpoint, "train")
    return SampleWorker(latent, 1), ScoreWorker(latent)


def test_samples_of_other_networks_are_refused(directory: Path) -> None:
    whole = arms(directory)
    sample, score = workers(whole.em("dro", 0), whole.checkpoint("dro", 0))
    samples = sample.process([{"query": q} for q in range(10)], 0)
    assert score.process(samples, 0)
    _, other = workers(whole.em("dro", 0), whole.checkpoint(COLD, 0))
    with pytest.raises(SnapshotMismatch, match="cannot be scored by"):
        other.process(samples, 0)


def test_a_sample_depends_on_its_question_and_seed_alone(directory: Path) -> None:
    whole = arms(directory)
    sample, _ = workers(whole.em("dro", 0), whole.checkpoint("dro", 0))
    together = sample.process([{"query": q} for q in range(10)], 5)
    assert sample.process([{"query": 7}], 6) == [together[7]]
    assert "answer" not in json.dumps(together)


def test_networks_of_two_iterations_cannot_score_together(directory: Path) -> None:
    whole = arms(directory)
    em, history = whole.em("dro", 0), whole.outcome("dro", 0).history
    now, before = em.current_checkpoint(history), em.current_checkpoint(history.until(1))
    samples = workers(em, now)[0].process([{"query": 1}], 0)
    for kind in KINDS:
        with pytest.raises(SnapshotMismatch):
            workers(em, {**now, kind: before[kind]})[1].process(samples, 0)


def phase(em: DRO, name: str) -> Any:
    return next(each for each in em.loop().phases if each.name == name)


def test_both_networks_learn_from_one_file_of_weights_and_only_those_that_an_arm_trains(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cluster = arms(directory), object()
    history = whole.outcome("dro", 0).history.until(1)
    weighed = history.latest("weigh")
    assert weighed is not None
    for arm in ("dro", "selector_only", "generator_only"):
        em = replace(whole.em("dro", 0), arm=ARMS[arm])
        learned: dict[str, Any] = {}

        def spy(task: Any, config: Any, directory: Path, *, seed: int, name: str, cluster: Any) -> Any:
            learned[name] = (sha256(task.data), cluster)  # noqa: B023
            return SimpleNamespace(weights=em.cold[name])  # noqa: B023

        monkeypatch.setattr("mobula.rag.dro.dro.fit", spy)
        phase(em, "fit").run(Context(tmp_path, 1, 0, history, cluster))  # type: ignore[arg-type]
        assert learned == dict.fromkeys(ARMS[arm].train, (sha256(weighed / "permutations.jsonl"), cluster))


def test_a_cold_start_trains_on_the_runs_cluster(directory: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole, clusters = replace(arms(directory), directory=tmp_path, cluster=object()), []  # type: ignore[arg-type]
    cold = arms(directory).start(0)

    def spy(task: Any, config: Any, directory: Path, *, seed: int, name: str, cluster: Any) -> Any:
        clusters.append(cluster)
        return SimpleNamespace(weights=cold[name])

    monkeypatch.setattr("mobula.rag.dro.dro.fit", spy)
    whole.start(0)
    assert clusters == [whole.cluster] * 2


def test_weights_stay_those_of_the_networks_that_sampled(directory: Path, tmp_path: Path) -> None:
    """They follow from the scores alone: networks that have learned since do not change them."""
    whole = arms(directory)
    history = whole.outcome("dro", 0).history.until(1)
    weighed = history.latest("weigh")
    assert weighed is not None
    phase(whole.em("dro", 0), "weigh").run(Context(tmp_path, 1, 0, history, None))
    for name in ("weights.jsonl", "permutations.jsonl"):
        assert (tmp_path / name).read_bytes() == (weighed / name).read_bytes()


def test_questions_that_all_samples_fail_are_counted_and_those_alone_are_skipped(
    directory: Path, tmp_path: Path
) -> None:
    whole = arms(directory)
    em, history = whole.em("dro", 0), whole.outcome("dro", 0).history.until(1)
    best = {row["query"]: max(row["log_lik"]) for row in history.rows("score")}
    middle = float(np.median(list(best.values())))
    em.config.em.weights = WeightConfig(gate="skip", fail_eps=float(np.exp(middle)))
    facts = phase(em, "weigh").run(Context(tmp_path, 1, 0, history, None))
    kept = {query for query, value in best.items() if value >= middle}
    assert {row["query"] for row in read_jsonl(tmp_path / "permutations.jsonl")} == kept
    assert (facts["queries"], facts["skipped"]) == (len(kept), len(best) - len(kept))
    assert facts["all_fail"] == pytest.approx(1 - len(kept) / len(best))


def test_questions_that_kept_one_sample_are_refused_where_more_were_sampled(directory: Path) -> None:
    """Then every weight is 1, whatever the likelihoods say; arms that are given their passages have one."""
    with pytest.raises(EqualWeights, match=r"em\.samples=4 were drawn of every question, 1 are left"):
        check_samples([{"log_lik": [-1.0]}] * 5, 4)
    em = arms(directory).em("dro", 0)
    assert em.draws_samples and not replace(em, arm=ARMS["supervised"]).draws_samples


def test_a_generators_arm_is_judged_by_its_answers() -> None:
    """What passages are selected cannot change there, so the first iteration would always win."""
    values = {"method": "dro", "data": {"source": "nq"}, "alternation": {"monitor": "dev_hit@1"}}
    text, facts = build(Config, values), build(Config, {**CONFIG, "alternation": {"monitor": "dev_gold"}})
    monitors = {name: text.alternation_of(arm).monitor for name, arm in ARMS.items()}
    generators = {name for name, arm in ARMS.items() if "selector" not in arm.train}
    assert generators == {"generator_only", "rag_sft", "closed_book"}
    assert {monitors[name] for name in generators} == {"dev_f1"}
    assert {monitors[name] for name in monitors.keys() - generators} == {"dev_hit@1"}
    assert facts.alternation_of(ARMS["generator_only"]).monitor == "dev_em"
    assert build(Config, CONFIG).alternation_of(ARMS["generator_only"]).monitor == "dev_em"


def test_the_greedy_permutation_is_the_likeliest(directory: Path) -> None:
    both, every = networks(directory), arms(directory).questions.permutations()
    dev = both.questions.take("dev", list(range(20)))
    prior, _ = both.exact(dev)
    assert [one.permutation for one in both.selector.select(dev)] == [every[z] for z in prior.argmax(-1).tolist()]


def test_train_and_held_out_likelihoods_are_in_every_row(directory: Path) -> None:
    assert all({"train_log_p", "dev_log_p"} <= set(row) for row in rows(directory))


def test_where_facts_are_shown_leaves_exact_match_within_its_interval(directory: Path) -> None:
    both, questions = networks(directory), two_hop(1000, 4)
    exact = [
        np.array([row["exact"] for row in both.evaluate(shown, "selector")])
        for shown in (questions, shuffled(questions))
    ]
    difference = paired_difference(*exact)
    assert difference.low <= 0 <= difference.high


def test_measures_are_greedy_and_exact(directory: Path) -> None:
    both, questions = networks(directory, COLD), two_hop(50, 4)
    evaluated = both.evaluate(questions, "selector")
    assert evaluated == both.evaluate(questions, "selector")
    prior, likelihood = both.exact(questions)
    brute = np.log((prior.exp() * likelihood.exp()).sum(-1).numpy())
    assert [row["log_p"] for row in evaluated] == pytest.approx(brute)


def test_there_is_no_parametric_knowledge(directory: Path) -> None:
    """Without either gold fact, answers are right as often as by chance among the symbols of the facts."""
    both = networks(directory)
    every = both.questions.permutations()
    questions = both.questions.take("train", both.questions.queries("train"))
    others = [[not set(z) & set(gold) for z in every] for gold in questions.gold.tolist()]
    assert all(sum(row) == 12 for row in others)
    right = [one.em for one in both.generator.score(questions, [every] * len(questions))]
    assert np.array(right)[np.array(others)].mean() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["dr"]}, "arms: unknown 'dr'"),
        ({"arms": []}, "arms is empty"),
        ({"arms": ["dro", "lik_raw"]}, "arms: 'lik_raw' was renamed: use unnormalised"),
        ({"parallel": 2, "alternation": {"actors": 1}}, "parallel=2 needs alternation.actors=0"),
        ({"parallel": 2, "fit": {"workers": 2}}, "parallel=2 needs fit.workers=0"),
        ({"model": {"selector_width": 18}}, "model.selector_width=18 does not divide"),
        ({"em": {"weights": {"rule": "nll"}}}, "rule=nll is unknown"),
        ({"em": {"min_gap": -1.0}}, "em.min_gap was renamed: use em.min_q_gain"),
        ({"em": {"weights": {"correction": "exact"}}}, "nothing is to be corrected"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        build(Config, {**CONFIG, **change})
