"""Mistakes that would show in the numbers of exsearch alone, if anywhere: each has a test that they fail."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mobula.alternation import Context, Row
from mobula.config import build
from mobula.data.records import Document
from mobula.data.worlds.words import World, world
from mobula.models.causal import EOS, CausalModel, SmallShape
from mobula.models.finetune import token_log_probs
from mobula.rag import searchers
from mobula.rag.em import WEIGHTS, ScoreWorker, SnapshotMismatch
from mobula.rag.exsearch import artifact, data
from mobula.rag.exsearch.agent import Agent, SolveWorker
from mobula.rag.exsearch.chat import TemplatedChat
from mobula.rag.exsearch.config import ARMS, Config, Mode, RetrieveConfig
from mobula.rag.exsearch.data import Lookup, Problem, corpus_of
from mobula.rag.exsearch.exsearch import Trajectories
from mobula.rag.exsearch.measures import measure
from mobula.rag.exsearch.rollout import Rollouts
from mobula.rag.exsearch.study import Arms
from mobula.rag.exsearch.trajectory import Trajectory, Turn, own_rows, rows
from mobula.rag.exsearch.warm_up import oracle_of
from mobula.rag.search import Hit, IndexSelfTestError, Retrying, Shuffled, open_searcher, self_test
from mobula.rag.searchers import open_corpus
from mobula.rag.weighted_rows import DATA, QueryRows, RowsTask, write_rows
from mobula.running import run_experiment
from mobula.study import System
from mobula.training import TrainingConfig, fit
from mobula.training.loop import read_metrics
from tests.rag.exsearch import small

# One iteration of arms that learn by EM, by policy gradient and directly, one of them in another mode.
RUN: dict[str, Any] = {
    **small.CONFIG,
    "arms": ["exsearch", "grpo", "rerank", "closed_book"],
    "data": {**small.CONFIG["data"], "warm_up": 10, "train": 8, "dev": 4, "test": 4},
    "rollout": {"max_turns": 3, "max_action_tokens": 10},
    "em": {"samples": 2},
    "skill": {"steps": 4, "workers": 0},
    "warm_up": {"steps": 4, "workers": 0},
    "alternation": {**small.CONFIG["alternation"], "iterations": 1},
}
# The agent's turn begins right behind a line end.
MERGING = (
    "{% for m in messages %}\n{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant\n{% endif %}"
)
QUESTION = "what is the home of belford ?"


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Agent:
    return small.untrained(tmp_path_factory.mktemp("agent") / "model")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("exsearch")
    (root / "experiment.yaml").write_text(yaml.safe_dump(RUN))
    run_experiment(root / "experiment.yaml", [], root / "run")
    return root / "run"


@pytest.fixture
def task(agent: Agent, tmp_path: Path) -> RowsTask:
    """Six questions with one to three rows of different lengths and weights."""
    config = small.config()
    oracle = oracle_of(config, agent.opened, corpus_of(config.data, "warm_up"), Mode())
    every = [found.rows[0] for found in oracle.rows(small.problems("warm_up"), 0)]
    parts = [every[0:2], every[2:3], every[3:6], every[6:7], every[7:9], every[9:10]]
    write_rows(
        tmp_path / "rows.jsonl",
        [QueryRows([replace(row, weight=(k + 1) / 3) for k, row in enumerate(part)]) for part in parts],
    )
    return RowsTask(agent.model, tmp_path / "rows.jsonl")


def arms(directory: Path) -> Arms:
    return Arms(build(Config, RUN), directory)


def asked(count: int) -> list[Row]:
    return [{"query": problem.id, "question": problem.question} for problem in small.problems()[:count]]


def perfect(chosen: Sequence[Problem], lost: str = "") -> small.Say:
    """Follows the plans of problems; at the question ``lost`` it fails."""
    known = {problem.question: problem for problem in chosen}

    def say(prompt: str) -> str:
        question = prompt.split(" <turn>")[0]
        if question == lost:
            raise RuntimeError("no memory is left")
        if prompt.endswith("<ANSWER> <turn>"):
            return known[question].answers[0]
        plan, step = known[question].plan, prompt.count("<QUERY>")
        query = f"<QUERY> {plan[step].query}" if step < len(plan) else "<FINAL>"
        return f"<FACT> {plan[step - 1].fact} {query}" if step else query

    return say


# Training.


def test_the_training_loop_learns_the_same_from_micro_batches(task: RowsTask, tmp_path: Path) -> None:
    """Questions have different numbers of rows, of different lengths; later losses depend on the gradients before."""
    losses = []
    for micro in (4, 1):
        config = TrainingConfig(steps=3, batch=4, micro_batch=micro, lr=1e-2, warmup=0.0, report_every=1, workers=0)
        result = fit(task, config, tmp_path / f"micro-{micro}", seed=0, name="parts")
        losses.append([row["loss"] for row in read_metrics(result.history) if "loss" in row])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def gradient(task: RowsTask, parts: list[list[int]]) -> torch.Tensor:
    """The gradient of a batch that is done in parts, averaged as the training loop does."""
    network = task.build().double()
    for part in parts:
        loss, _ = task.loss(network, task.batch(torch.tensor(part), torch.Generator()))
        (loss / len(parts)).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[3, 0], [1, 2]], [[0], [1], [2], [3]]], ids=str)
def test_a_clipped_gradient_does_not_depend_on_how_queries_are_divided(task: RowsTask, parts: list[list[int]]) -> None:
    """Some ratios are 1, some have risen or fallen beyond the clip; advantages have both signs."""
    changed = [
        QueryRows([replace(row, weight=(-1) ** k * row.weight) for k, row in enumerate(found.rows)])
        for found in small.read_rows(task.data)
    ]
    write_rows(task.data, changed)
    clipped = RowsTask(task.start, task.data, clip=0.2)
    with torch.no_grad():
        said = clipped.reference(clipped.build())["log_probs"]
    clipped.refer({"log_probs": said + torch.tensor([0.0, -0.5, 0.5]).repeat(len(said))[: len(said)]})
    whole = gradient(clipped, [[0, 1, 2, 3]])
    assert whole.abs().max() > 0
    torch.testing.assert_close(gradient(clipped, parts), whole, rtol=1e-5, atol=1e-9)


def test_ratios_of_a_policy_gradient_begin_at_1_whatever_the_sampler_said(task: RowsTask) -> None:
    """In half precision the sampler's log-probabilities are off by more than that; the trainer's own are not."""
    clipped = RowsTask(task.start, task.data, clip=0.2)
    network = clipped.build().to(torch.bfloat16)
    with torch.no_grad():
        clipped.refer(clipped.reference(network))
        batch = clipped.batch(torch.tensor([2, 0]), torch.Generator())
        now = token_log_probs(network, batch)
        exact = token_log_probs(clipped.build(), batch)
    real = batch["attention"][:, 1:] == 1
    # The same rows in another batch: a matter of padding, and far below what half precision changes.
    assert (now - batch["old"])[real].abs().max() < (exact - batch["old"])[real].abs().max() / 2


@pytest.mark.parametrize("clip", [None, 0.2])
def test_nothing_is_learned_of_what_a_repair_puts_into_the_agents_mouth(
    agent: Agent, tmp_path: Path, clip: float | None
) -> None:
    """What is scored and has a gradient is the agent's own, in a turn that was really repaired."""
    said = iter(["<QUERY> home of belford", "folford is the", "seat of folford", "<FACT> by <FINAL>", "folford"])
    (found,) = small.rollouts(lambda prompt: next(said)).run([QUESTION], [0])
    assert found.flags.repaired == 1
    encode, eos = agent.opened.encode, agent.opened.eos
    given, own = encode("<FACT> folford is the <QUERY>"), [*encode("seat of folford"), eos]
    start = sum(len(turn.ids) for turn in found.turns[:3])
    (row,) = own_rows(found, 1.0) if clip else rows(found, [*encode("folford"), eos], 1.0)
    assert row.ids[start : start + len(given) + len(own)] == given + own

    write_rows(tmp_path / "rows.jsonl", [QueryRows([row])])
    task = RowsTask(agent.model, tmp_path / "rows.jsonl", clip=clip)
    network, scored = task.build(), []
    if clip:
        with torch.no_grad():
            task.refer(task.reference(network))

    def keep(module: torch.nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        output.logits.retain_grad()
        scored.append((named["learned"], output.logits))

    network.register_forward_hook(keep, with_kwargs=True)
    task.loss(network, task.batch(torch.arange(1), torch.Generator()))[0].backward()
    ((learned, log_probs),) = scored
    assert (log_probs.grad != 0).all()
    touched = [False, *learned[0].tolist()]
    assert touched[start : start + len(given) + len(own)] == [False] * len(given) + [True] * len(own)
    assert touched == [kind > 0 for kind in row.mask]


# Scores and weights.


def test_one_sample_of_another_model_among_many_is_refused(agent: Agent) -> None:
    answers = {problem.id: list(problem.answers) for problem in small.problems()}
    drawn = small.sampler(agent).process(asked(4), 0)
    items = [{**row, "answers": answers[row["query"]]} for row in drawn]
    scorer = ScoreWorker(Trajectories(agent, 2))
    assert len(scorer.process(items, 0)) == len(items)
    with pytest.raises(SnapshotMismatch, match="samples of another cannot be scored"):
        scorer.process([*items[:-1], {**items[-1], "snapshot": "another"}], 0)


def test_weighing_again_after_the_model_has_changed_gives_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    em = arms(directory).em("exsearch", 0)
    history = arms(directory).outcome("exsearch", 0).history.until(1)
    before = {row["snapshot"] for row in history.rows("sample")}
    assert em.latent(em.current_checkpoint(history), "train").snapshot not in before
    facts, written = em._weigh(Context(tmp_path, 1, 0, history, None)), history.latest("weigh")
    assert written is not None
    for name in (WEIGHTS, DATA):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    assert facts == history.facts("weigh")


def test_sums_are_exact_though_the_logits_are_in_half_precision(agent: Agent) -> None:
    """The network's own logits are, unlike those of the copying one: log-probabilities are taken in fp32."""
    model = CausalModel.small(agent.opened.tokenizer, SmallShape(positions=128), 0)
    model.network.to(torch.bfloat16)
    kept: list[torch.Tensor] = []
    model.network.register_forward_hook(lambda module, inputs, output: kept.append(output.logits))
    prompt, target = model.encode(QUESTION), model.encode(" ".join(["folford"] * 70))
    (said,) = model.log_probs([prompt], [target])
    (logits,) = kept
    assert logits.dtype == torch.bfloat16 and said.dtype == torch.float32
    plain = logits[0].double().log_softmax(-1)
    expected = sum(float(plain[len(prompt) + i - 1, token]) for i, token in enumerate(target))
    assert expected < -300
    assert float(said.double().sum()) == pytest.approx(expected, abs=1e-3)


def test_exactly_the_questions_that_all_samples_fail_are_counted_and_left_out(directory: Path, tmp_path: Path) -> None:
    """With a threshold that half of them fail; without the gate they count, and stay."""
    made = arms(directory)
    em, history = made.em("exsearch", 0), made.outcome("exsearch", 0).history.until(1)
    scores = history.rows("score")
    best = {score["query"]: max(score["log_lik"]) / score["answer_tokens"] for score in scores}
    em.config.em.weights.fail_eps = float(np.exp(np.median(list(best.values()))))
    failed = {query for query, value in best.items() if value < np.log(em.config.em.weights.fail_eps)}
    assert 0 < len(failed) < len(best)
    questions = {problem.id: problem.question for problem in em.problems("train")}
    decode = em.agent(em.warm, "train").opened.decode
    for name, left in (("gate_skip", set(best) - failed), ("gate_none", set(best))):
        (tmp_path / name).mkdir()
        facts = replace(em, arm=ARMS[name])._weigh(Context(tmp_path / name, 1, 0, history, None))
        assert facts["all_fail"] == pytest.approx(len(failed) / len(best))
        assert (facts["queries"], facts["skipped"]) == (len(left), len(best) - len(left))
        learned = small.read_rows(tmp_path / name / DATA)
        told = [{decode(row.ids).split(" <turn>")[0] for row in query.rows} for query in learned]
        assert told == [{questions[query]} for query in best if query in left]
        assert all(sum(row.weight for row in query.rows) == pytest.approx(1) for query in learned)


# Questions, answers and who may see them.


def test_who_samples_needs_nothing_that_knows_an_answer(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages are made again and the worker is opened anew, while nobody can ask for questions."""
    items, carried = asked(3), pickle.dumps(small.sampler(agent))
    before = small.sampler(agent).process(items, 0)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError("answers are elsewhere")

    monkeypatch.setattr(World, "questions", refuse)
    monkeypatch.setattr(data, "problems_of", refuse)
    searchers._opened.cache_clear()
    world.cache_clear()
    with pytest.raises(PermissionError):
        small.problems()
    assert pickle.loads(carried).process(items, 0) == before


def test_a_question_that_fails_costs_no_other_its_answer(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    chosen = small.problems()
    items, lost = [asdict(problem) for problem in chosen], chosen[5]

    def solved(say: small.Say) -> list[Row]:
        told = replace(agent)
        told.opened = small.scripted(say)
        return list(SolveWorker(told).process(items, 0))

    undisturbed, found = solved(perfect(chosen)), solved(perfect(chosen, lost.question))
    assert {row["em"] for row in undisturbed} == {1.0}
    assert found[5]["query"] == lost.id and (found[5]["em"], found[5]["failed"]) == (0.0, 1.0)
    assert found[5]["error"] == "RuntimeError: no memory is left"
    assert found[:5] + found[6:] == undisturbed[:5] + undisturbed[6:]
    assert "could not be answered" in caplog.text


def test_the_oracle_selects_the_passage_that_has_the_fact(agent: Agent) -> None:
    """Wherever it stands among the candidates: their order is shuffled, for BM25 finds it first every time."""
    config, model = small.config(), agent.opened
    corpus = corpus_of(config.data, "warm_up")
    oracle = oracle_of(config, model, corpus, Mode(select=True))
    oracle = replace(oracle, searcher=Shuffled(oracle.searcher))
    texts, named = {document.id: document.text for document in corpus.documents()}, set()
    for problem in small.problems("warm_up"):
        for found in oracle.rows([problem], 0):
            for row, step in zip(found.rows[1:], problem.plan, strict=True):
                prompt = model.decode([token for token, kind in zip(row.ids, row.mask, strict=True) if not kind])
                label = model.decode([token for token, kind in zip(row.ids, row.mask, strict=True) if kind])
                first = label.split()[0]
                assert prompt.split(f"{first} ")[1].startswith(texts[step.passage])
                named.add(first)
    assert len(named) > 3


@pytest.mark.parametrize("direct", [False, True])
def test_evaluation_does_not_heed_the_temperature_of_samples(agent: Agent, direct: bool) -> None:
    hot = replace(agent, rollout=replace(agent.rollout, temperature=3.0, top_p=0.5))
    items = [asdict(problem) for problem in small.problems()]
    assert SolveWorker(hot, direct).process(items, 0) == SolveWorker(agent, direct).process(items, 0)


def test_what_is_served_does_not_heed_it_either(agent: Agent, tmp_path: Path) -> None:
    hot = replace(agent, rollout=replace(agent.rollout, temperature=3.0, top_p=0.5))
    plain, served = (
        artifact.load(artifact.write(tmp_path / name, made, [], {})) for name, made in (("plain", agent), ("hot", hot))
    )
    questions = [problem.question for problem in small.problems()]
    assert served.agent.rollout.temperature == 3.0
    assert served.answer(questions) == plain.answer(questions)


# Searching.


class Constant:
    """Answers every query alike."""

    hash = "constant"

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [[Hit(str(i), 1.0, i + 1) for i in range(k)] for _ in queries]

    def document(self, id: str) -> Document:
        raise KeyError(id)


def test_an_index_that_finds_all_because_there_are_few_must_tell_them_apart() -> None:
    documents = [Document(str(i), f"title {i}", f"text of number {i}") for i in range(5)]
    with pytest.raises(IndexSelfTestError, match=r"of 5 documents, 5 are found .* and 1 different ones come first"):
        self_test(Constant(), documents)
    self_test(open_searcher(documents, "bm25"), documents)


def test_an_index_is_tested_when_it_is_made() -> None:
    with pytest.raises(IndexSelfTestError, match="are documents alike"):
        open_searcher([Document(str(i), "", "all of them say this") for i in range(20)], "bm25")


# What is compared.


def test_every_arm_has_as_many_parameters_and_the_report_names_what_they_share(directory: Path) -> None:
    made = arms(directory)
    networks = {name: CausalModel.open(str(made.model(name, 0))).network for name in made.config.arms}
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert len(set(counts.values())) == 1, counts
    notes = json.loads((directory / "report.json").read_text())["notes"]
    assert sum(made.harness(System("exsearch")) in note for note in notes) == 1


# Tokens.


def test_a_token_that_decoding_loses_is_kept_and_learned() -> None:
    """A word that the model does not know: reading the turn's text again would give other tokens."""
    texts = ["<QUERY> zebra home of belford", "<FACT> zebra a <FINAL>", "folford"]
    said = iter(texts)
    (found,) = small.rollouts(lambda prompt: next(said)).run([QUESTION], [0])
    model = small.scripted(lambda prompt: "")
    turns = [turn for turn in found.turns if turn.role == "assistant"]
    drawn = [[*model.encode(text), model.eos] for text in texts[:2]]
    assert all(model.tokenizer.unk_token_id in ids for ids in drawn)
    assert [turn.ids for turn in turns] == drawn
    assert [turn.text for turn in turns] == ["<QUERY> home of belford", "<FACT> a <FINAL>"]
    (row,) = rows(found, [*model.encode("folford"), model.eos], 1.0)
    assert [token for token, kind in zip(row.ids, row.mask, strict=True) if kind == 1] == drawn[0] + drawn[1]


def merging(say: small.Say) -> small.Scripted:
    """A model whose tokens are bytes, but for a line end with the mark behind it."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([EOS, *alphabet, "Ċ<"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "<")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False)
    fast.chat_template = MERGING
    made = small.Scripted(CausalModel.small(fast, SmallShape(1, 16, 2, 64), 0).network, fast, "merging")
    made.say = say
    return made


def test_a_line_end_that_would_merge_with_the_agents_marker_stays_apart() -> None:
    """The chat is what was encoded apart, put together; the same text encoded as a whole has other tokens."""
    texts = ["<QUERY> home of belford", "<FACT> folford\n<FINAL>", "folford"]
    said = iter(texts)
    config = small.config(rollout={"seq_len": 8192, "max_action_tokens": 64, "max_answer_tokens": 32})
    model = merging(lambda prompt: next(said))
    searcher = open_corpus(corpus_of(config.data, "train"), RetrieveConfig())
    (found,) = Rollouts(model, Retrying(searcher), config.rollout).run([QUESTION], [0])

    chat = TemplatedChat(model, config.rollout.max_passage_tokens)
    drawn = [[*model.encode(text), model.eos] for text in texts]
    passages = chat.results([searcher.document(id) for id in found.shown[0]])
    assert found.context == [*chat.begin(QUESTION), *drawn[0], *passages, *drawn[1], *chat.close(QUESTION)]
    (row,) = rows(found, drawn[2], 1.0)
    assert [token for token, kind in zip(row.ids, row.mask, strict=True) if kind] == [t for ids in drawn for t in ids]
    whole = model.tokenizer.decode(row.ids)
    again = model.encode(whole)
    assert model.tokenizer.decode(again) == whole
    assert again != row.ids and len(again) < len(row.ids)


def test_a_marker_of_several_tokens_is_cut_whole() -> None:
    """Its first token begins with the line end before it, so that goes as well."""
    texts = ["<QUERY> home of belford\n<SEARCH> [1] x", "<FACT> folford\n<FINAL>", "folford"]
    said = iter(texts)
    config = small.config(rollout={"seq_len": 8192, "max_action_tokens": 64, "max_answer_tokens": 32})
    model = merging(lambda prompt: next(said))
    searcher = open_corpus(corpus_of(config.data, "train"), RetrieveConfig())
    (found,) = Rollouts(model, Retrying(searcher), config.rollout).run([QUESTION], [0])
    turn, kept = found.turns[1], model.encode("<QUERY> home of belford")
    assert (turn.ids, turn.mask) == ([*kept, model.eos], [1] * len(kept) + [0])


# Measures.

TITLES = {"1": ("ana lee", "ana lee works for bank"), "2": ("bank", "bank is based in rome"), "3": ("bo", "bo is .")}


def judged(shown: list[list[str]], answers: tuple[str, ...] = ("rome",), support: tuple[str, ...] = ("1", "2")) -> Row:
    """The measures of a trajectory that was shown these passages, search by search."""
    plan = tuple(Lookup("", "", id) for id in support)
    queries = [f"query {number}" for number in range(len(shown))]
    found = Trajectory([Turn.given("user", "", [1])], queries, shown=shown, prediction="rome")
    return measure(
        Problem("q", "where ?", answers, support, "2-hop", plan), found, lambda id: Document(id, *TITLES[id])
    )


def test_an_answer_is_looked_for_in_what_the_last_search_showed() -> None:
    assert judged([["1"], ["2", "3"]])["answer_hit"] == 1.0
    assert judged([["2"], ["1", "3"]])["answer_hit"] == 0.0
    assert judged([["3"], ["2"]], ("bank",))["answer_hit"] == 1.0
    assert judged([])["answer_hit"] == 0.0


@pytest.mark.parametrize("answer", ["yes", "No"])
def test_no_passage_is_expected_to_say_yes_or_no(answer: str) -> None:
    found = judged([["1"], ["2", "3"]], (answer,))
    assert found["answer_hit"] is None
    assert found["gold_hit"] == 1.0


@pytest.mark.parametrize(
    ("shown", "gold", "last", "under", "over"),
    [
        ([["1", "3"], ["2"]], 1.0, 1.0, 0.0, 0.0),
        ([["1", "2"]], 1.0, 1.0, 0.0, 0.0),
        ([["2"], ["1"]], 1.0, 0.0, 0.0, 0.0),
        ([["1"], ["3"]], 0.5, 0.0, 1.0, 0.0),
        ([["2"]], 0.5, 1.0, 1.0, 0.0),
        ([["1", "2"], ["3"]], 1.0, 0.0, 0.0, 1.0),
        ([["1"], ["2"], []], 1.0, 0.0, 0.0, 1.0),
        ([], 0.0, 0.0, 1.0, 0.0),
    ],
)
def test_searches_that_end_before_all_golds_were_shown_or_go_on_after(
    shown: list[list[str]], gold: float, last: float, under: float, over: float
) -> None:
    found = judged(shown)
    names = ("gold_hit", "last_gold_hit", "under_search", "over_search", "searches")
    assert [found[name] for name in names] == [gold, last, under, over, len(shown)]


def test_who_was_given_nothing_has_failed() -> None:
    problem = Problem("q", "where ?", ("rome",), ("1",), "1-hop", (Lookup("", "", "1"),))
    found = measure(problem, Trajectory(), lambda id: Document(id, *TITLES[id]))
    assert (found["failed"], found["em"], found["gold_hit"], found["under_search"]) == (1.0, 0.0, 0.0, 1.0)
    assert judged([["1"], ["2"]])["failed"] == 0.0


def test_how_far_the_sampler_is_from_the_trainer_is_in_every_row(directory: Path) -> None:
    made = arms(directory)
    em, outcome = made.em("exsearch", 0), made.outcome("exsearch", 0)
    for row in outcome.rows[1:]:
        assert row["sampler_kl"] == pytest.approx(0, abs=1e-4)  # one network does both
    scores = [{**score, "log_ratio": [-0.5, 0.1]} for score in outcome.history.rows("score")]
    assert em.facts(scores)["sampler_kl"] == pytest.approx(0.2)
