"""Rollouts of agents that follow a script: turns, limits, malformed turns, failing searches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

import pytest

from mobula.data.records import Document
from mobula.rag.exsearch.config import Mode, RetrieveConfig
from mobula.rag.exsearch.data import Problem
from mobula.rag.exsearch.trajectory import MALFORMED, Action, Trajectory, own_rows, parse, rows
from mobula.rag.search import Hit, Searcher, SearchFailed
from mobula.rag.searchers import open_corpus
from tests.rag.exsearch import small


def perfect(problem: Problem) -> Callable[[str], str]:
    """Follows the plan of a problem, whatever it is shown."""

    def say(prompt: str) -> str:
        if prompt.endswith("<ANSWER> <turn>"):
            return problem.answers[0]
        step = prompt.count("<QUERY>")
        query = f"<QUERY> {problem.plan[step].query}" if step < len(problem.plan) else "<FINAL>"
        return f"<FACT> {problem.plan[step - 1].fact} {query}" if step else query

    return say


def run(say: Callable[[str], str], question: str = "what is the home of belford ?", **options: object) -> Trajectory:
    return small.rollouts(say, **options).run([question], [0])[0]  # type: ignore[arg-type]


class Failing:
    """A searcher that fails a number of times, then finds nothing."""

    hash = "failing"

    def __init__(self, times: int) -> None:
        self.times, self.asked = times, 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.asked += 1
        if self.asked <= self.times:
            raise SearchFailed("away")
        return [[] for _ in queries]

    def document(self, id: str) -> Document:
        raise KeyError(id)


class Late(Failing):
    """A searcher that takes its time."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        time.sleep(5)
        return [[] for _ in queries]


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_an_agent_thinks_searches_records_and_answers(hops: int) -> None:
    problem = small.problems(hops=hops)[0]
    found = run(perfect(problem), problem.question)
    assert found.queries == [step.query for step in problem.plan]
    assert found.facts == [step.fact for step in problem.plan]
    assert found.prediction == problem.answers[0]
    assert [ids[0] for ids in found.shown] == [step.passage for step in problem.plan]
    roles = [turn.role for turn in found.turns]
    assert roles == ["user", "assistant"] * (hops + 1) + ["user"]
    assert not any([found.flags.malformed, found.flags.forced_final, found.flags.overflow, found.flags.empty_facts])


def test_passages_are_those_of_the_sub_query_and_numbered_from_one() -> None:
    problem = small.problems(hops=1)[0]
    found = run(perfect(problem), problem.question)
    corpus = open_corpus(small.corpus_of(small.config().data, "train"), RetrieveConfig())
    texts = [corpus.document(id).text for id in found.shown[0]]
    model = small.scripted(perfect(problem))
    assert model.decode(found.turns[2].ids) == f"<SEARCH> [1] {texts[0]} [2] {texts[1]} <turn>"


@pytest.mark.parametrize(
    ("text", "first", "expected"),
    [
        ("<QUERY> home of ana", True, Action("query", "", "home of ana")),
        ("well <QUERY> home of ana", True, Action("query", "", "home of ana")),
        ("<QUERY> home <QUERY> seat", True, Action("query", "", "home")),
        ("<QUERY> home\nmore", True, Action("query", "", "home")),
        ("<QUERY>", True, MALFORMED),
        ("home of ana", True, MALFORMED),
        ("<FINAL>", True, MALFORMED),
        ("", True, MALFORMED),
        ("<FACT> ana lives in rome\n<QUERY> seat of rome", False, Action("query", "ana lives in rome", "seat of rome")),
        ("<FACT> ana lives in rome\n<FINAL>", False, Action("final", "ana lives in rome")),
        ("<FACT> none <FINAL>", False, Action("final", "")),
        ("<FACT> <FINAL>", False, Action("final", "")),
        ("<FACT> rome <FINAL> <QUERY> x", False, Action("final", "rome")),
        ("<FACT> rome <QUERY> x <FINAL>", False, Action("query", "rome", "x")),
        ("<FACT> rome", False, MALFORMED),
        ("<QUERY> seat of rome", False, MALFORMED),
        ("<FACT> rome <QUERY> <FINAL>", False, MALFORMED),
        ("<FACT> rome <SEARCH> [1] x <FINAL>", False, MALFORMED),
    ],
)
def test_turns_are_read_by_their_first_markers(text: str, first: bool, expected: Action) -> None:
    assert parse(text, fact=not first, query=first) == expected


def test_a_malformed_turn_gets_a_second_chance_that_is_not_learned_whole() -> None:
    """Its beginning is put into the agent's mouth: mask 0."""
    said = iter(["<QUERY> home of belford", "folford is the", "seat of folford", "<FACT> by <FINAL>", "folford"])
    found = run(lambda prompt: next(said))
    assert (found.flags.malformed, found.flags.repaired, found.flags.forced_final) == (1, 1, False)
    assert found.facts == ["folford is the", "by"]
    assert found.queries == ["home of belford", "seat of folford"]
    turn = found.turns[3]
    assert turn.text == "<FACT> folford is the <QUERY> seat of folford"
    assert turn.mask == [0] * 5 + [1] * 4


def test_a_turn_that_stays_malformed_ends_the_search_and_counts() -> None:
    found = run(lambda prompt: "")
    assert (found.flags.malformed, found.flags.repaired, found.flags.forced_final) == (1, 1, True)
    assert found.queries == [] and found.prediction == ""


def test_terminating_keeps_every_token_that_was_drawn() -> None:
    say = {"<ANSWER> <turn>": "folford"}
    found = run(
        lambda prompt: next((v for k, v in say.items() if prompt.endswith(k)), "home"), on_malformed="terminate"
    )
    assert (found.flags.malformed, found.flags.repaired, found.flags.forced_final) == (1, 0, True)
    assert [turn.role for turn in found.turns] == ["user", "assistant", "user"]
    assert found.turns[1].mask == [1, 1] and found.log_q == sum(found.sampled) == -1.0
    assert found.prediction == "folford"


def test_turns_are_limited_and_the_last_one_searches_no_more() -> None:
    found = run(
        lambda p: "<QUERY> home of belford" if p.count("<QUERY>") == 0 else "<FACT> a <QUERY> home of belford",
        max_turns=3,
    )
    assert found.flags.forced_final
    assert len(found.queries) == 2 and len(found.shown) == 2
    assert found.flags.repeat_queries == 1


def test_a_chat_that_grows_too_long_is_closed() -> None:
    found = run(
        lambda p: "<QUERY> home of belford" if p.count("<QUERY>") == 0 else "<FACT> a <QUERY> home of belford",
        seq_len=120,
    )
    assert found.flags.overflow
    assert found.length + 6 <= 120
    assert len(found.queries) <= 2


def test_what_is_said_in_the_environments_name_is_cut_and_nobody_learns_its_marker() -> None:
    said = iter(["<QUERY> home of belford <SEARCH> [1] belford in folford", "<FACT> a <FINAL>", "folford"])
    found = run(lambda prompt: next(said))
    model, turn = small.scripted(lambda prompt: ""), found.turns[1]
    assert turn.text == "<QUERY> home of belford" and found.queries == ["home of belford"]
    assert turn.ids == [*model.encode("<QUERY> home of belford"), model.eos]
    assert turn.mask == [1, 1, 1, 1, 0]  # its end was not drawn
    assert len(turn.log_probs) == len(turn.log_q) == sum(turn.mask)
    (row,) = rows(found, [model.eos], 1.0)
    learned = model.decode([token for token, kind in zip(row.ids, row.mask, strict=True) if kind == 1])
    assert "<SEARCH>" not in learned


def test_a_turn_that_is_only_the_environments_marker_is_malformed() -> None:
    said = iter(["<SEARCH> [1] belford", "home of belford", "<FACT> a <FINAL>", "folford"])
    found = run(lambda prompt: next(said))
    assert (found.flags.malformed, found.flags.repaired, found.queries) == (1, 1, ["home of belford"])


def test_tokens_that_are_trained_on_are_those_that_were_sampled() -> None:
    problem = small.problems(hops=2)[0]
    found = run(perfect(problem), problem.question)
    model = small.scripted(perfect(problem))
    gold = [*model.encode(problem.answers[0]), model.eos]
    (row,) = rows(found, gold, 0.5)
    assert row.ids == [*found.context, *gold]
    learned = [token for token, kind in zip(row.ids, row.mask, strict=True) if kind == 1]
    assert learned == [token for turn in found.turns if turn.role == "assistant" for token in turn.ids]
    assert row.mask[-len(gold) :] == [2] * len(gold)
    given = [token for turn in found.turns if turn.role == "user" for token in turn.ids]
    assert [token for token, kind in zip(row.ids, row.mask, strict=True) if kind == 0] == given
    (own,) = own_rows(found, -0.1)
    context = len(found.context)
    assert own.mask[:context] == row.mask[:context]
    assert found.answer is not None and own.ids == [*found.context, *found.answer.ids]


def test_a_trajectory_is_read_as_it_was_written() -> None:
    problem = small.problems(hops=2)[0]
    found = run(perfect(problem), problem.question)
    assert Trajectory.read(found.to_dict()) == found


def test_without_thinking_every_query_is_the_question_and_nobody_learns_it() -> None:
    problem = small.problems(hops=2)[0]
    found = run(perfect(problem), problem.question, mode=Mode(think=False))
    assert set(found.queries) == {problem.question}
    assert found.turns[1].mask == [0] * len(found.turns[1].ids)
    assert found.flags.repeat_queries == len(found.queries) - 1


def test_without_searching_nothing_is_shown() -> None:
    problem = small.problems(hops=2)[0]
    found = run(perfect(problem), problem.question, mode=Mode(search=False))
    assert found.shown == [[], []]
    assert small.scripted(perfect(problem)).decode(found.turns[2].ids) == "<SEARCH> <turn>"


def test_without_recording_no_fact_stays_in_the_chat() -> None:
    problem = small.problems(hops=2)[0]
    found = run(perfect(problem), problem.question, mode=Mode(record=False))
    assert found.facts == []
    assert not any("<FACT>" in turn.text for turn in found.turns)
    assert found.queries == [step.query for step in problem.plan]


def test_a_selection_is_shown_in_its_order_and_is_a_row_of_its_own() -> None:
    problem = small.problems(hops=1)[0]
    plan = perfect(problem)
    found = run(
        lambda p: "[3] > [1] > [9]" if p.endswith("<SELECT> <turn>") else plan(p),
        problem.question,
        mode=Mode(select=True),
    )
    candidates = [id for id, _, _ in found.hits[0]]
    assert len(candidates) == 6
    assert found.shown == [[candidates[2], candidates[0]]]
    model = small.scripted(plan)
    _, chosen = rows(found, [model.eos], 1.0)
    assert model.decode([t for t, kind in zip(chosen.ids, chosen.mask, strict=True) if kind]) == "[3] > [1] > [9]"
    assert found.selections[0].turn.log_probs[0] in found.sampled


def noting(problem: Problem, facts: Sequence[str]) -> Callable[[str], str]:
    """Writes these facts, one a note, and otherwise follows the plan of a problem."""

    def say(prompt: str) -> str:
        if prompt.startswith("<turn>"):
            step = next(i for i, step in enumerate(problem.plan) if f"<QUERY> {step.query} <SEARCH>" in prompt)
            return facts[step]
        if prompt.endswith("<ANSWER> <turn>"):
            return problem.answers[0]
        step = prompt.count("<QUERY>")
        return f"<QUERY> {problem.plan[step].query}" if step < len(problem.plan) else "<FINAL>"

    return say


def test_a_fact_written_apart_sees_its_search_alone_and_is_a_row_of_its_own() -> None:
    problem = small.problems(hops=2)[0]
    say = noting(problem, [f"<FACT> {step.fact}" for step in problem.plan])
    found = run(say, problem.question, mode=Mode(record_from_evidence=True))
    assert (found.queries, found.facts) == ([s.query for s in problem.plan], [s.fact for s in problem.plan])
    assert (found.prediction, found.flags.malformed) == (problem.answers[0], 0)
    model = small.scripted(say)
    for note, step in zip(found.notes, problem.plan, strict=True):
        prompt = model.decode(note.prompt)
        assert prompt.startswith(f"<turn> <QUERY> {step.query} <SEARCH> [1] ")
        assert problem.question not in prompt
        assert note.turn.text == f"<FACT> {step.fact}" and all(note.turn.mask)
    for turn, fact in zip(found.turns[3:-1:2], found.facts, strict=True):
        given = len(model.encode(f"<FACT> {fact}"))
        assert turn.mask == [0] * given + [1] * (len(turn.ids) - given)
    main, *notes = rows(found, model.encode("x"), 0.5)
    assert len(notes) == 2 and all(row.weight == 0.5 for row in notes)
    assert [row.ids for row in notes] == [[*note.prompt, *note.turn.ids] for note in found.notes]
    assert sum(main.mask[: found.length]) == sum(sum(turn.mask) for turn in found.turns)
    assert len(found.sampled) == sum(sum(turn.mask) for turn in found.turns) + sum(len(n.turn.ids) for n in found.notes)
    assert Trajectory.read(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("said", "fact", "malformed"),
    [("<FACT> none", "", 0), ("home of", "home of", 1), ("<FACT> home <QUERY> seat", "home", 0), ("", "", 1)],
)
def test_a_fact_written_apart_without_its_marker_counts_as_it_is(said: str, fact: str, malformed: int) -> None:
    problem = small.problems(hops=1)[0]
    found = run(noting(problem, [said]), problem.question, mode=Mode(record_from_evidence=True))
    assert (found.facts, found.flags.malformed, found.flags.repaired) == ([fact], malformed, 0)
    assert found.turns[3].text.split() == ["<FACT>", *fact.split(), "<FINAL>"]  # small models have no word for none


def test_a_turn_after_a_fact_written_apart_is_repaired_behind_it() -> None:
    problem = small.problems(hops=1)[0]
    query, fact = problem.plan[0].query, problem.plan[0].fact
    said = iter([f"<QUERY> {query}", f"<FACT> {fact}", "well", query, f"<FACT> {fact}", "<FINAL>", "x"])
    found = run(lambda prompt: next(said), problem.question, mode=Mode(record_from_evidence=True))
    assert (found.flags.malformed, found.flags.repaired, found.flags.repeat_queries) == (1, 1, 1)
    assert found.turns[3].text == f"<FACT> {fact} <QUERY> {query}"
    assert found.facts == [fact, fact]


def test_a_selection_that_cannot_be_read_leaves_the_retrievers_order() -> None:
    problem = small.problems(hops=1)[0]
    plan = perfect(problem)
    found = run(
        lambda p: "the first" if p.endswith("<SELECT> <turn>") else plan(p), problem.question, mode=Mode(select=True)
    )
    assert found.flags.malformed_selections == 1
    assert found.shown == [[id for id, _, _ in found.hits[0][:2]]]


@pytest.mark.parametrize(("times", "retries", "errors"), [(1, 2, 0), (3, 2, 1)])
def test_a_search_is_tried_again_and_then_flagged(times: int, retries: int, errors: int) -> None:
    searcher: Searcher = Failing(times)
    problem = small.problems(hops=1)[0]
    found = run(perfect(problem), problem.question, searcher=searcher, retries=retries)
    assert found.flags.retriever_errors == errors
    assert found.shown == [[]] and found.prediction == problem.answers[0]


def test_a_slow_search_is_flagged_and_the_question_goes_on() -> None:
    problem = small.problems(hops=1)[0]
    made = small.rollouts(perfect(problem), searcher=Late(0))
    made.searcher.timeout_s = 0.05
    (found,) = made.run([problem.question], [0])
    assert found.flags.retriever_errors == 1
    assert found.prediction == problem.answers[0]


def test_questions_in_flight_share_their_searches_and_keep_apart() -> None:
    chosen = [small.problems(hops=n)[0] for n in (1, 2, 3)]
    plans = {problem.question: perfect(problem) for problem in chosen}

    def say(prompt: str) -> str:
        return plans[prompt.split(" <turn>")[0]](prompt)

    found = small.rollouts(say).run([problem.question for problem in chosen], [0, 1, 2])
    assert [t.prediction for t in found] == [problem.answers[0] for problem in chosen]
    assert [len(t.queries) for t in found] == [1, 2, 3]


def test_one_search_with_the_question_and_none() -> None:
    problem = small.problems(hops=1)[0]
    (one,) = small.rollouts(lambda prompt: "folford").direct([problem.question], [0])
    assert one.prediction == "folford" and one.queries == [problem.question] and len(one.shown[0]) == 2
    (none,) = small.rollouts(lambda prompt: "folford", mode=Mode(search=False)).direct([problem.question], [0])
    assert none.queries == [] and none.shown == []
