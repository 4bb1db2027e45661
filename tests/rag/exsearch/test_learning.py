"""What an agent of exsearch learns from: scores, weights, masks, batches; and who may see an answer."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobula.alternation import Row
from mobula.errors import ConfigError, DataError
from mobula.models.causal import CausalModel, word_tokenizer
from mobula.models.finetune import TokenRow
from mobula.models.language_model import Continuation, EngineConfig
from mobula.rag.em import ScoreWorker, SnapshotMismatch
from mobula.rag.exsearch import rollout as rollout_module
from mobula.rag.exsearch.agent import Agent, SolveWorker
from mobula.rag.exsearch.config import ARMS, WARM_UP, Mode
from mobula.rag.exsearch.data import corpus_of
from mobula.rag.exsearch.exsearch import ExSearch, QGainWorker, Trajectories
from mobula.rag.exsearch.report import claims_of, require_search, warnings
from mobula.rag.exsearch.trajectory import Trajectory, rows
from mobula.rag.exsearch.warm_up import fresh, oracle_of, start_model
from mobula.rag.weighted_rows import QueryRows, RowsTask, write_rows
from mobula.study import Results, System
from tests.models.tiny_llama import save_llama
from tests.rag.exsearch import small


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Agent:
    return small.untrained(tmp_path_factory.mktemp("agent") / "model")


@pytest.fixture(scope="module")
def samples(agent: Agent) -> list[Row]:
    return list(small.sampler(agent).process(asked(4), 0))


def asked(count: int) -> list[Row]:
    return [{"query": problem.id, "question": problem.question} for problem in small.problems()[:count]]


def with_answers(samples: list[Row]) -> list[Row]:
    answers = {problem.id: list(problem.answers) for problem in small.problems()}
    return [{**row, "answers": answers[row["query"]]} for row in samples]


def score(agent: Agent, samples: list[Row]) -> list[Row]:
    return list(ScoreWorker(Trajectories(agent, 2)).process(samples, 0))


def scored(agent: Agent, samples: list[Row]) -> list[Row]:
    return score(agent, with_answers(samples))


def oracle_rows(model: CausalModel, count: int = 4, mode: Mode | None = None) -> list[QueryRows]:
    config = small.config()
    oracle = oracle_of(config, model, corpus_of(config.data, "warm_up"), mode or Mode())
    return oracle.rows(small.problems("warm_up")[:count], 0)


# Sampling.


def test_a_sample_does_not_depend_on_its_company_or_its_shard(agent: Agent, samples: list[Row]) -> None:
    worker, items = small.sampler(agent), asked(4)
    apart = {row["query"]: row for item in reversed(items) for row in worker.process([item], 99)}
    for row in samples:
        for one, other in zip(row["trajectories"], apart[row["query"]]["trajectories"], strict=True):
            assert [turn["ids"] for turn in one["turns"]] == [turn["ids"] for turn in other["turns"]]
    drawn = [json.dumps(trajectory["turns"]) for row in samples for trajectory in row["trajectories"]]
    assert len(set(drawn)) == len(drawn) == 8


def test_no_answer_reaches_who_samples(agent: Agent) -> None:
    """Neither items nor worker hold one, and no prompt is made of anything else."""
    loop = ExSearch(small.config(), ARMS["exsearch"], agent.model, 0).loop()
    sample = next(phase for phase in loop.phases if phase.name == "sample")
    items = sample.items(None)  # type: ignore[union-attr]
    assert all(set(item) == {"query", "question"} for item in items)
    worker = pickle.dumps(small.sampler(agent))
    for problem, item in zip(small.problems(), items, strict=True):
        assert problem.answers[0] not in str(item) and problem.answers[0].encode() not in worker
    assert not any(name in vars(rollout_module) for name in ("Problem", "problems_of"))


def test_a_probe_changes_the_order_of_what_is_shown_and_nothing_else(agent: Agent) -> None:
    plain, probe = agent.searcher.searcher, replace(agent, shuffled=True).searcher.searcher
    queries = [problem.plan[0].query for problem in small.problems()]
    one, other = plain.search(queries, 5), probe.search(queries, 5)
    assert [sorted(found, key=lambda hit: hit.rank) for found in other] == one
    assert other != one and other == probe.search(queries, 5)
    assert probe.document(one[0][0].id) == plain.document(one[0][0].id)


def test_evaluation_repeats_itself_whatever_the_batch(agent: Agent) -> None:
    items = [asdict(problem) for problem in small.problems("dev")]
    many = SolveWorker(agent).process(items, 0)
    one = SolveWorker(replace(agent, rollout=replace(agent.rollout, batch=1))).process(items, 5)
    assert many == one == SolveWorker(agent).process(items, 1)
    assert len(many) == len(items)


def test_a_model_that_always_fails_leaves_every_question_in_the_denominator(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> list[Continuation]:
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(CausalModel, "sample", fail)
    items = [asdict(problem) for problem in small.problems("dev")]
    found = SolveWorker(agent).process(items, 0)
    assert [row["query"] for row in found] == [item["id"] for item in items]
    assert {(row["em"], row["failed"], row["prediction"]) for row in found} == {(0.0, 1.0, "")}
    assert {row["error"] for row in found} == {"RuntimeError: no memory is left"}
    assert "could not be answered" in caplog.text


# Scores.


def test_only_the_gold_answer_and_its_end_are_scored(agent: Agent, samples: list[Row]) -> None:
    model = agent.opened
    for row, item in zip(scored(agent, samples), with_answers(samples), strict=True):
        gold = [*model.encode(item["answers"][0]), model.eos]
        assert row["answer_tokens"] == len(gold)
        for k, trajectory in enumerate(map(Trajectory.read, item["trajectories"])):
            (log_probs,) = model.log_probs([trajectory.context], [gold])
            assert row["log_lik"][k] == pytest.approx(float(log_probs.double().sum()), abs=1e-4)
            assert row["log_prior"][k] == pytest.approx(sum(trajectory.sampled), abs=1e-3)
            assert row["log_ratio"][k] == pytest.approx(0.0, abs=1e-3)


def test_the_sampled_answer_is_not_in_the_scored_context(agent: Agent, samples: list[Row]) -> None:
    item = with_answers(samples)[0]
    changed = json.loads(json.dumps(item))
    changed["trajectories"][0]["answer"]["ids"] = [9, 9, 9]
    changed["trajectories"][0]["prediction"] = "elsewhere"
    one, other = score(agent, [item, changed])
    assert (one["log_lik"], one["log_prior"]) == (other["log_lik"], other["log_prior"])


def test_an_earlier_turn_changes_the_score_through_the_context_alone(agent: Agent, samples: list[Row]) -> None:
    """Its own log-probability is no summand: an unlikelier turn may leave the answer likelier."""
    item = with_answers(samples)[0]
    changed = json.loads(json.dumps(item))
    turn = changed["trajectories"][0]["turns"][1]
    turn["ids"][0] = (turn["ids"][0] + 11) % 300
    one, other = score(agent, [item, changed])
    before, after = (Trajectory.read(each["trajectories"][0]).context for each in (item, changed))
    gold = [*agent.opened.encode(item["answers"][0]), agent.opened.eos]
    plain = [float(agent.opened.log_probs([context], [gold])[0].double().sum()) for context in (before, after)]
    assert [one["log_lik"][0], other["log_lik"][0]] == pytest.approx(plain, abs=1e-4)


def test_a_longer_answer_sums_over_more_tokens(agent: Agent, samples: list[Row]) -> None:
    item = with_answers(samples)[0]
    double = {**item, "answers": [" ".join([item["answers"][0]] * 2)]}
    one, other = score(agent, [item, double])
    assert other["answer_tokens"] == 2 * one["answer_tokens"] - 1
    assert other["log_lik"][0] < one["log_lik"][0]


def test_sums_are_exact_though_the_model_is_in_half_precision(agent: Agent) -> None:
    """Sums near -300 and -305 keep their difference: log-probabilities are taken in fp32 and summed in fp64."""
    model = CausalModel.open(str(agent.model))
    model.network.to(torch.bfloat16)
    prompt, target = model.encode("what is the home of belford ?"), model.encode(" ".join(["folford"] * 60))
    said = model.log_probs([prompt], [target])[0]
    assert said.dtype == torch.float32
    with torch.inference_mode():
        logits = model.network(input_ids=torch.tensor([prompt + target])).logits[0].double().log_softmax(-1)
    plain = [float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(target)]
    assert float(said.double().sum()) == pytest.approx(sum(plain), abs=1e-3)


def test_samples_of_another_model_are_refused(agent: Agent, samples: list[Row], tmp_path: Path) -> None:
    fresh(small.config(), 1).save(tmp_path / "other")
    with pytest.raises(SnapshotMismatch, match="cannot be scored"):
        score(replace(agent, model=tmp_path / "other"), with_answers(samples))


def test_a_row_that_is_too_long_has_no_score(agent: Agent, samples: list[Row]) -> None:
    short = replace(agent, rollout=replace(agent.rollout, seq_len=32))
    assert {value for row in scored(short, samples) for value in row["log_lik"]} == {None}


# Weights.


def scores(log_lik: list[float | None], **more: list[float]) -> Row:
    zeros = [0.0] * len(log_lik)
    columns = {name: more.get(name, zeros) for name in ("empty_facts", "log_ratio", "reward", "em")}
    return {"log_lik": log_lik, "answer_tokens": 2, **columns}


def em_of(name: str = "exsearch", **em: Any) -> ExSearch:
    return ExSearch(small.config(em=em), ARMS[name], Path(), 0)


def test_what_is_filtered_or_too_long_leaves_before_normalisation() -> None:
    found = em_of(max_empty_facts=1).weights(scores([-1.0, None, -2.0, -1.5], empty_facts=[0, 0, 2, 1]))
    assert found.values.sum() == pytest.approx(1)
    assert [value > 0 for value in found.values] == [True, False, False, True]
    assert found.values[0] / found.values[3] == pytest.approx(np.exp(0.5))


def test_the_gate_skips_questions_that_every_sample_fails_and_no_others() -> None:
    failed, close = scores([-9.0, -8.0]), scores([-9.0, -1.0])
    assert em_of("gate_skip").weights(failed).skipped == "every sample fails"
    assert not em_of("gate_none").weights(failed).skipped
    assert not em_of("gate_skip").weights(close).skipped


def test_a_policy_gradient_compares_samples_with_each_other() -> None:
    found = em_of("grpo").weights(scores([-1.0, -1.0], reward=[1.0, 0.0]))
    assert found.values.tolist() == pytest.approx([0.5, -0.5], abs=1e-5)
    assert em_of("grpo").weights(scores([-9.0, -9.0], reward=[0.5, 0.5])).skipped


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rollout": {"top_p": 0.9, "on_malformed": "terminate"}}, "top_p"),
        ({"rollout": {"on_malformed": "repair"}}, "on_malformed"),
    ],
)
def test_a_correction_needs_what_was_drawn_whole(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        small.config(em={"weights": {"correction": "exact"}}, **changes)
    small.config(em={"weights": {"correction": "exact"}}, rollout={"temperature": 0.7, "on_malformed": "terminate"})


def test_the_correction_is_the_ratio_of_model_and_proposal(agent: Agent) -> None:
    cooler = replace(agent, rollout=replace(agent.rollout, temperature=0.7, on_malformed="terminate"))
    drawn = list(small.sampler(cooler).process(asked(3), 0))
    for row, scores in zip(drawn, scored(cooler, drawn), strict=True):
        for k, trajectory in enumerate(map(Trajectory.read, row["trajectories"])):
            proposed = sum(q for turn in trajectory.turns for q in turn.log_q)
            assert scores["log_ratio"][k] == pytest.approx(sum(trajectory.sampled) - proposed, abs=1e-3)
            assert scores["log_ratio"][k] != 0
            assert scores["log_prior"][k] == pytest.approx(sum(trajectory.sampled), abs=1e-3)


def test_the_correction_recovers_the_posterior_where_latents_can_be_enumerated() -> None:
    """30 latents drawn at temperature 0.7: with the ratio, weights converge to the posterior; without, elsewhere."""
    chance = np.random.default_rng(0)
    prior = np.log(chance.dirichlet(np.ones(30)))
    log_lik = chance.normal(-3, 1.5, 30)
    proposal = prior / 0.7 - np.logaddexp.reduce(prior / 0.7)
    posterior = np.exp(prior + log_lik - np.logaddexp.reduce(prior + log_lik))
    drawn = chance.choice(30, size=30_000, p=np.exp(proposal) / np.exp(proposal).sum())
    ratio = (prior - proposal)[drawn]
    far = {}
    for correction in ("exact", "none"):
        made = small.config(em={"weights": {"correction": correction}}, rollout={"on_malformed": "terminate"})
        em = ExSearch(made, ARMS["exsearch"], Path(), 0)
        weighed = em.weights(scores(log_lik[drawn].tolist(), log_ratio=ratio.tolist()))
        found = np.bincount(drawn, weighed.values, 30)
        far[correction] = np.abs(found - posterior).sum() / 2
    assert far["exact"] <= 0.03 < far["none"]


def test_another_temperature_makes_weights_heuristic_and_says_so() -> None:
    def told(**rollout: float) -> list[str]:
        config = small.config(rollout=rollout) if rollout else small.config()
        return list(warnings(config, {}))

    assert told() == []
    assert "heuristic weights" in told(top_p=0.95)[0]
    assert "heuristic weights" in told(temperature=0.8)[0]


def test_curves_that_part_are_named() -> None:
    """Training samples are of the model before a row's M-step, held-out ones of the model behind it."""

    def run(bounds: list[float], held: list[float], em: float) -> list[Row]:
        later = [{"iwae_bound": b, "sample_em": 0.1 + em * i} for i, b in enumerate(bounds)]
        return [{"dev_iwae_bound": h, **row} for h, row in zip(held, [{}, *later], strict=True)]

    runs = {
        "fine": [run([-9, -7, -5], [-9, -5, -6, -6], 0.1)],
        "last": [run([-9, -7, -5], [-9, -5, -6, -12], 0.1)],
        "far": [run([-9, -7, -5], [-9, -8, -10, -8], 0.1)],
        "bold": [run([-9, -7, -5], [-9, -8, -6, -6], -0.01)],
    }
    told = list(warnings(small.config(), runs))
    assert [line.split(",")[0] for line in told] == ["far", "bold"]
    assert "over-fitted" in told[0] and "unsupported answers" in told[1]


@pytest.mark.parametrize(("closed", "verdict"), [(1.0, "does_not_hold"), (0.0, "holds")])
def test_claims_that_fail_say_so(closed: float, verdict: str) -> None:
    def solved(em: list[float]) -> list[list[Row]]:
        names = ("em", "f1", "last_gold_hit")
        return [[{"query": i, "stratum": "1-hop", **dict.fromkeys(names, e)} for i, e in enumerate(em)]]

    right = [1.0] * 20
    tested = {System(name): solved(right) for name in ("exsearch", WARM_UP)}
    shuffled = System.of("exsearch", passages="shuffled")
    tested |= {shuffled: solved([1.0] * 5 + [0.0] * 15), System("closed_book"): solved([closed] * 20)}
    results = Results(small.config(evaluation={"decisive": True}), tested, {"exsearch": [[]]})
    verdicts = {claim.name: claim.verdict for claim in claims_of(results, (np.zeros((1, 5)),) * 2)}
    assert (verdicts["exsearch, passages shuffled"], verdicts["closed book"]) == ("does_not_hold", verdict)


def test_a_world_of_parametric_knowledge_ends_the_run() -> None:
    def answered(one: float, *, decisive: bool = True) -> Results:
        rows = [[{"query": i, "em": em} for i, em in enumerate(run)] for run in ([one, 0.0], [0.0, one])]
        return Results(small.config(evaluation={"decisive": decisive, "seeds": 2}), {System("closed_book"): rows}, {})

    require_search(answered(0.0))
    with pytest.raises(DataError, match=r"closed_book answers 0\.50 of the test questions"):
        require_search(answered(1.0))
    require_search(answered(1.0, decisive=False))  # too small to decide


# Training.


@pytest.fixture
def task(agent: Agent, tmp_path: Path) -> RowsTask:
    """Four questions with two, one, three and one rows of different weights."""
    found = oracle_rows(agent.opened, 7)
    parts = [found[0:2], found[2:3], found[3:6], found[6:7]]
    queries = [QueryRows([replace(part.rows[0], weight=(k + 1) / 3) for k, part in enumerate(each)]) for each in parts]
    write_rows(tmp_path / "rows.jsonl", queries)
    return RowsTask(agent.model, tmp_path / "rows.jsonl")


def gradient(task: RowsTask, parts: list[list[int]]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a batch that is done in parts, averaged as the training loop does."""
    network, total = task.build().double(), 0.0
    for part in parts:
        batch = task.batch(torch.tensor(part), torch.Generator())
        loss, _ = task.loss(network, batch)
        (loss / len(parts)).backward()
        total += float(loss.detach()) / len(parts)
    return total, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[3, 0], [1, 2]], [[0], [1], [2], [3]]], ids=str)
def test_loss_and_gradient_do_not_depend_on_how_queries_are_divided(task: RowsTask, parts: list[list[int]]) -> None:
    whole, divided = gradient(task, [[0, 1, 2, 3]]), gradient(task, parts)
    assert divided[0] == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(divided[1], whole[1], rtol=1e-5, atol=1e-9)


def test_the_loss_is_the_weighted_sum_over_learned_tokens(task: RowsTask) -> None:
    network = task.build()
    loss, _ = task.loss(network, task.batch(torch.arange(4), torch.Generator()))
    model, expected = CausalModel.open(str(task.start)), 0.0
    every = [row for query in small.read_rows(task.data) for row in query.rows]
    for row in every:
        (said,) = model.log_probs([row.ids[:1]], [row.ids[1:]])
        expected -= row.weight * sum(p for p, kind in zip(said.tolist(), row.mask[1:], strict=True) if kind)
    mean = sum(sum(map(bool, row.mask)) for row in every) / len(every)
    assert float(loss.detach()) == pytest.approx(expected / (4 * mean), rel=1e-4)


def test_nothing_is_learned_at_tokens_that_the_agent_did_not_say(task: RowsTask) -> None:
    """Only what it said itself is scored and has a gradient: no question, passage, request or repair."""
    batch, network = task.batch(torch.arange(4), torch.Generator()), task.build()
    scored: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module: torch.nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        output.logits.retain_grad()
        scored.append((named["learned"], output.logits))

    network.register_forward_hook(keep, with_kwargs=True)
    task.loss(network, batch)[0].backward()
    ((asked, log_probs),) = scored
    learned = batch["mask"][:, 1:] > 0
    assert torch.equal(asked, learned)
    assert log_probs.grad is not None and (log_probs.grad != 0).all()
    assert 0.1 < float(learned.sum()) / float(batch["attention"].sum()) < 0.6


def test_weights_are_constants(task: RowsTask) -> None:
    batch = task.batch(torch.arange(4), torch.Generator())
    assert not batch["weights"].requires_grad
    double = {**batch, "weights": 2 * batch["weights"]}
    network = task.build()
    one, other = (float(task.loss(network, each)[0].detach()) for each in (batch, double))
    assert other == pytest.approx(2 * one, rel=1e-6)


def test_a_ratio_beyond_its_clip_teaches_nothing(agent: Agent, task: RowsTask) -> None:
    found = [row for query in small.read_rows(task.data) for row in query.rows][:1]
    moved = {"same": 0.0, "risen": -1.0, "fallen": 1.0}

    def norm(kind: str, advantage: float) -> float:
        write_rows(task.data, [QueryRows([replace(found[0], weight=advantage)])])
        clipped = RowsTask(task.start, task.data, clip=0.2)
        with torch.no_grad():
            clipped.refer({"log_probs": clipped.reference(clipped.build())["log_probs"] + moved[kind]})
        return float(gradient(clipped, [[0]])[1].norm())

    assert norm("same", 1.0) > 0 and norm("fallen", 1.0) > 0 and norm("risen", -1.0) > 0
    assert norm("risen", 1.0) == 0 == norm("fallen", -1.0)


def test_the_gain_of_q_is_what_a_training_has_gained(agent: Agent, task: RowsTask) -> None:
    rows_of = small.read_rows(task.data)[0].rows
    item = {"rows": [asdict(row) for row in rows_of], "before": -10.0}
    (found,) = QGainWorker(agent).process([item], 0)
    plain = 0.0
    for row in rows_of:
        (said,) = agent.opened.log_probs([row.ids[:1]], [row.ids[1:]])
        plain += row.weight * sum(p for p, kind in zip(said.tolist(), row.mask[1:], strict=True) if kind)
    assert found["q_gain"] == pytest.approx(plain + 10.0, abs=1e-3)


# The oracle.


@pytest.mark.parametrize("finetune", [False, True])
def test_a_pretrained_model_starts_as_it_is(tmp_path: Path, finetune: bool) -> None:
    """Under an adapter, or whole; then the model that is saved is one of its own."""
    base = save_llama(tmp_path / "base", word_tokenizer(["a", "b"]))
    model = {"base": str(base), "finetune": finetune}
    started = start_model(small.config(data={"source": "hotpotqa"}, model=model), tmp_path / "seed", 0, Mode())
    opened = CausalModel.open(str(started))
    assert (opened.base is None) == (started / "model.safetensors").is_file() == finetune
    plain, (ids,) = CausalModel.open(str(base)), [[3, 4, 3]]
    torch.testing.assert_close(opened.log_probs([ids[:1]], [ids[1:]]), plain.log_probs([ids[:1]], [ids[1:]]))
    trained = {name for name, p in opened.network.named_parameters() if p.requires_grad}
    assert (trained == {name for name, _ in plain.network.named_parameters()}) == finetune


def test_a_worker_opens_its_model_once(agent: Agent) -> None:
    named = replace(agent, engine=EngineConfig(kind="torch"))
    assert named.rollouts(greedy=True).model is named.rollouts(greedy=False).model is named.opened
    assert agent.rollouts(greedy=True).model is agent.opened


def test_an_oracle_shows_the_gold_passage_and_answers_with_it(agent: Agent) -> None:
    model = agent.opened
    for problem, found in zip(small.problems("warm_up"), oracle_rows(model, 20), strict=False):
        (row,) = found.rows
        text = model.decode(row.ids)
        assert all(f"<QUERY> {step.query}" in text and f"<FACT> {step.fact}" in text for step in problem.plan)
        learned = [token for token, kind in zip(row.ids, row.mask, strict=True) if kind == 2]
        assert model.decode(learned) == problem.answers[0]


def test_selections_of_the_oracle_name_the_gold_passage_first_from_one(agent: Agent) -> None:
    model = agent.opened
    for found in oracle_rows(model, 5, Mode(select=True)):
        for row in found.rows[1:]:
            prompt = model.decode([token for token, kind in zip(row.ids, row.mask, strict=True) if not kind])
            said = model.decode([token for token, kind in zip(row.ids, row.mask, strict=True) if kind])
            first = int(said.split("]")[0].removeprefix("["))
            assert 1 <= first <= 6 and prompt.count(f"[{first}]") == 1


def test_an_oracle_writes_facts_apart_and_learns_each_of_them_once(agent: Agent) -> None:
    model, problems = agent.opened, small.problems("warm_up")
    for found, problem in zip(oracle_rows(model, 5, Mode(record_from_evidence=True)), problems, strict=False):
        main, *notes = found.rows
        texts = [model.decode([t for t, kind in zip(row.ids, row.mask, strict=True) if kind == 1]) for row in notes]
        assert texts == [f"<FACT> {step.fact or 'none'}" for step in problem.plan]
        learned = model.decode([token for token, kind in zip(main.ids, main.mask, strict=True) if kind == 1])
        assert "<FACT>" not in learned and learned.count("<QUERY>") == len(problem.plan) and "<FINAL>" in learned
        whole = oracle_rows(model, 5)[problems.index(problem)].rows
        assert [main.ids] == [row.ids for row in whole]


def test_the_skill_stage_shuffles_what_it_shows(agent: Agent) -> None:
    config = small.config()
    oracle = oracle_of(config, agent.opened, corpus_of(config.data, "warm_up"), Mode(), shuffle=True)
    texts = [agent.opened.decode(found.rows[0].ids) for found in oracle.rows(small.problems("warm_up"), 0)]
    assert {"[2]" in text for text in texts} == {True, False}


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rows_keep_their_order_and_weights(tmp_path: Path) -> None:
    made = [QueryRows([TokenRow([1, 2], [0, 1], 0.25), TokenRow([1, 3], [0, 2], 0.75)], -3.0), QueryRows([], None)]
    write_rows(tmp_path / "rows.jsonl", made)
    assert small.read_rows(tmp_path / "rows.jsonl") == made


def test_a_trajectory_teaches_the_gold_answer_and_not_its_own(agent: Agent, samples: list[Row]) -> None:
    found = Trajectory.read(samples[0]["trajectories"][0])
    (row,) = rows(found, [9, agent.opened.eos], 1.0)
    assert row.ids[-2:] == [9, agent.opened.eos] and row.mask[-2:] == [2, 2]
    assert row.ids[: found.length] == found.context
