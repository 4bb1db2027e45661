"""The world of words: what its questions need, and what gives nothing away."""

from __future__ import annotations

from collections import Counter

import pytest

from mobula.data.worlds.words import HELD_OUT, RELATIONS, Size, World, words, world
from mobula.errors import DataError
from mobula.retrieval.lexical import Bm25, terms
from mobula.retrieval.search import SearchOptions


@pytest.fixture(scope="module")
def made() -> World:
    return world(0, Size())


def hits(made: World, queries: list[str], k: int) -> list[list[str]]:
    found = Bm25(made.documents).search(queries, [SearchOptions(k=k)] * len(queries))
    return [[hit.doc_id for hit in result.hits] for result in found]


def test_a_plan_leads_from_the_question_to_the_answer(made: World) -> None:
    texts = {document.id: document.text for document in made.documents}
    for asked in made.questions(300, "train", held_out=True):
        for hop in asked.plan:
            assert f"{hop.sentence} ." in texts[hop.passage]
            assert hop.sentence.endswith(hop.object)
        assert asked.answer == asked.plan[-1].object
        assert asked.answer not in asked.text
        for before, after in zip(asked.plan, asked.plan[1:], strict=False):
            assert after.query.endswith(f"of {before.object}")


def test_hops_have_their_shares(made: World) -> None:
    lengths = Counter(len(asked.plan) for asked in made.questions(400, "train", held_out=True))
    assert 0.15 < lengths[1] / 400 < 0.35
    assert 0.55 < lengths[2] / 400 < 0.75
    assert lengths[3] > 20


def test_a_raw_question_finds_the_first_passage_and_not_the_last(made: World) -> None:
    """Exsearch 9.2 and 11.15: otherwise a search more would prove nothing."""
    asked = made.questions(300, "test", held_out=True)
    deep = [question for question in asked if len(question.plan) > 1]
    first = hits(made, [question.text for question in asked], 3)
    assert sum(q.plan[0].passage in found for q, found in zip(asked, first, strict=True)) / len(asked) >= 0.85
    last = hits(made, [question.text for question in deep], 3)
    assert sum(q.plan[-1].passage in found for q, found in zip(deep, last, strict=True)) / len(deep) <= 0.30
    hops = [hop for question in asked for hop in question.plan]
    planned = hits(made, [hop.query for hop in hops], 3)
    assert sum(hop.passage in found for hop, found in zip(hops, planned, strict=True)) / len(hops) >= 0.95


def test_questions_and_passages_call_relations_by_different_words(made: World) -> None:
    said = {term for document in made.documents for term in terms(document.text)}
    asked = {term for relation in RELATIONS.values() for text in relation.nouns for term in terms(text)}
    assert not said & asked
    assert all(len(set(relation.nouns)) == 2 for relation in RELATIONS.values())


def test_held_out_chains_are_of_test_questions_alone(made: World) -> None:
    assert not any(q.held_out for q in made.questions(300, "train", held_out=False))
    test = made.questions(300, "test", held_out=True)
    assert 10 < sum(q.held_out for q in test) < 150
    assert all((q.chain in HELD_OUT) == q.held_out for q in test)


def test_another_seed_is_another_world_in_the_same_words(made: World) -> None:
    other = world(1, Size())
    assert not {d.text for d in made.documents} & {d.text for d in other.documents}
    known = set(words())
    for one in (made, other):
        questions = one.questions(100, "train", held_out=True)
        assert {w for d in one.documents for w in d.text.split()} <= known
        assert {w for q in questions for w in q.text.split()} <= known
    assert made.questions(50, "train", held_out=True) == World(0, Size()).questions(50, "train", held_out=True)


def test_names_share_their_parts_and_their_stems_do_not_run_together(made: World) -> None:
    names = [document.title for document in made.documents if document.id.startswith("person")]
    assert len(set(names)) == 300
    assert len({name.split()[0] for name in names}) <= 60
    stems = [terms(word) for word in words() if terms(word)]
    assert len({tuple(stem) for stem in stems}) == len(stems)


def test_a_world_that_is_asked_too_much_says_so() -> None:
    with pytest.raises(DataError, match="no 500 questions"):
        World(0, Size(people=6, towns=4, firms=2, books=2)).questions(500, "train", held_out=True)
    with pytest.raises(DataError, match=r"world.towns=61"):
        World(0, Size(towns=61))
