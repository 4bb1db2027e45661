"""Question sets in their files' own formats, real ones where they are, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mobula.data import questions as module
from mobula.data.questions import hotpotqa, natural_questions, squad
from mobula.environment import data_folder
from mobula.errors import BadRecord, DataError
from mobula.evaluation.answers import holds

real = pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set")
PROMPT = (
    "Instructions.\n"
    '[1] Title: "The ""Big"" O" Text:  First ""line"".\nQuestion: in it?\n'
    "[2] Title: Rihanna Text:  Second.\n"
    "Question: who?\nYour answer: "
)
NATURAL = {"prompt": PROMPT, "response": "x", "query_id": "7"}
READING = {"question": "where?", "context": "She lives in oslo now.", "answer": "Oslo", "answer_span": [13, 17]}


def written(folder: Path, name: str, records: Any) -> str:
    (folder / name).write_text(json.dumps(records))
    return str(folder)


def test_passages_are_read_out_of_prompts(tmp_path: Path) -> None:
    (question,), documents = natural_questions(written(tmp_path, module.NATURAL, [NATURAL]))
    assert (question.id, question.text, question.answers, question.support) == ("7", "who?", ("x",), ())
    assert [(d.title, d.text) for d in documents] == [
        ('The "Big" O', 'First "line".\nQuestion: in it?'), ("Rihanna", "Second.")
    ]  # fmt: skip
    assert question.passages == tuple(d.id for d in documents)


def test_a_passage_of_two_questions_is_one_document(tmp_path: Path) -> None:
    twice = [NATURAL, {**NATURAL, "query_id": "8"}]
    questions, documents = natural_questions(written(tmp_path, module.NATURAL, twice))
    assert len(documents) == 2 and questions[0].passages == questions[1].passages


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "nothing"}, "no passages"),
        ({"prompt": "a\n[1] Title: x\n[2] Title: y Text: z\nQuestion: q\nYour answer: "}, "without title or text"),
        ({"response": "..."}, "an answer with letters or digits"),
        ({"query_id": None, "prompt": 3}, "record 1"),
    ],
)
def test_damaged_questions_are_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        natural_questions(written(tmp_path, module.NATURAL, [{**NATURAL, **change}]))


def test_answers_in_texts(tmp_path: Path) -> None:
    (reading,) = squad(written(tmp_path, module.SQUAD, [READING]))
    assert reading.text[reading.start : reading.end] == "oslo"
    with pytest.raises(BadRecord, match=r"record 2.*answer_span"):
        squad(written(tmp_path, module.SQUAD, [READING, {**READING, "answer_span": [0, 4]}]))


@pytest.mark.parametrize("load", [natural_questions, squad, hotpotqa])
def test_missing_and_unreadable_files_are_named(tmp_path: Path, load: Any) -> None:
    with pytest.raises(DataError, match="name the folder"):
        load(str(tmp_path))
    for name in (module.NATURAL, module.SQUAD, module.HOTPOTQA):
        (tmp_path / name).write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        load(str(tmp_path))
    for name in (module.NATURAL, module.SQUAD, module.HOTPOTQA):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match="expected a list"):
        load(str(tmp_path))


def test_rows_of_the_hub_read_as_files_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms in which hotpotqa/hotpot_qa and Tevatron/wikipedia-nq publish their rows."""
    two_hops = {
        "id": "a", "question": "q?", "answer": "x", "type": "bridge",
        "supporting_facts": {"title": ["T", "U"], "sent_id": [0, 0]},
        "context": {"title": ["T", "U", "V"], "sentences": [["t."], ["u."], ["v."]]},
    }  # fmt: skip
    judged = {
        "query_id": "1", "query": "q?", "answers": ["x", "y"],
        "positive_passages": [{"docid": "p", "title": "P", "text": "x"}],
        "negative_passages": [{"docid": "n", "title": "N", "text": "z"}],
    }  # fmt: skip
    rows = {"owner/hotpotqa": [two_hops], "owner/nq": [judged]}
    monkeypatch.setattr(module, "hub_rows", lambda name, subset, split: rows[name])
    (question,), documents = hotpotqa("owner/hotpotqa")
    assert question.support == ("T", "U") and question.passages == ("T", "U", "V") and len(documents) == 3
    (question,), documents = natural_questions("owner/nq")
    assert question.support == ("p",) and question.passages == ("p", "n") and question.answers == ("x", "y")
    assert [d.title for d in documents] == ["P", "N"]


@real
def test_natural_questions_as_published() -> None:
    questions, documents = natural_questions()
    known = {document.id: document for document in documents}
    assert (len(questions), len(documents)) == (1000, 4889)
    own = [any(holds(f"{known[id].title} {known[id].text}", q.answers) for id in q.passages) for q in questions]
    assert sum(own) == 694


@real
def test_hotpotqa_and_squad_as_published() -> None:
    questions, documents = hotpotqa()
    assert sum(len(question.passages) == 10 for question in questions) == 493
    known = {document.id for document in documents}
    assert all(set(question.support) <= set(question.passages) <= known for question in questions)
    assert len(squad()) == 1978
