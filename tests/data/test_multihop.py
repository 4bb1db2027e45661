"""Small sets of multi-hop questions: their records, and what is wrong with damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mobula.data.multihop import (
    HOTPOTQA_100,
    MUSIQUE,
    TWO_WIKI,
    TWO_WIKI_CORPUS,
    hotpotqa_100,
    musique,
    two_wiki,
)
from mobula.data.questions import hotpotqa
from mobula.environment import data_folder
from mobula.errors import BadRecord, DataError

RECORD = {
    "id": "1",
    "question": "Who led the society that prints the journal?",
    "answer": "Ana",
    "answer_aliases": ["Ana L."],
    "paragraphs": [
        {"idx": 0, "title": "Society", "paragraph_text": "Ana led the Society."},
        {"idx": 1, "title": "Journal", "paragraph_text": "The Society prints it."},
        {"idx": 2, "title": "Society", "paragraph_text": "Another society."},
    ],
    "question_decomposition": [
        {"question": "Who prints the journal?", "answer": "Society", "paragraph_support_idx": 1},
        {"question": "Who led #1 ?", "answer": "Ana", "paragraph_support_idx": 0},
    ],
}


def write(folder: Path, records: list[dict[str, object]]) -> str:
    (folder / MUSIQUE).write_text(json.dumps(records))
    return str(folder)


def test_steps_are_closed_and_know_their_passages(tmp_path: Path) -> None:
    (question,), documents = musique(write(tmp_path, [RECORD]))
    assert question.steps == (("Who prints the journal?", "Society"), ("Who led Society ?", "Ana"))
    assert question.support == ("Journal", "Society") and question.kind == "2-hop"
    assert question.answers == ("Ana", "Ana L.")
    assert [document.id for document in documents] == ["Society", "Journal", "Society (2)"]


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="record 1: not a record of MuSiQue"):
        musique(write(tmp_path, [{**RECORD, "question_decomposition": [{"question": "x"}]}]))
    with pytest.raises(DataError, match="musique"):
        musique(str(tmp_path / "nowhere"))


def test_two_wiki_knows_which_passages_support_a_question(tmp_path: Path) -> None:
    rows = [{"question": "Who?", "ground_truth": ["Ana", "Bo"], "answer": "", "evidence": ["Bo"]}]
    corpus = [{"title": title, "text": f"{title} is here."} for title in ("Ana", "Bo", "Cy")]
    (tmp_path / TWO_WIKI).write_text(json.dumps(rows))
    (tmp_path / TWO_WIKI_CORPUS).write_text(json.dumps(corpus))
    (question,), documents = two_wiki(str(tmp_path))
    assert (question.text, question.support, question.answers) == ("Who?", ("Ana", "Bo"), ())
    assert [document.id for document in documents] == ["Ana", "Bo", "Cy"]
    (tmp_path / TWO_WIKI_CORPUS).write_text(json.dumps(corpus[1:]))
    with pytest.raises(BadRecord, match=r"'Ana'.* are not in 2wikimultihopqa_corpus"):
        two_wiki(str(tmp_path))
    (tmp_path / TWO_WIKI_CORPUS).write_text(json.dumps([{"title": "Ana"}]))
    with pytest.raises(BadRecord, match="not the records of 2WikiMultihopQA"):
        two_wiki(str(tmp_path))


def test_hotpotqa_100_has_the_form_of_hotpotqa(tmp_path: Path) -> None:
    record = {
        "_id": "1", "question": "q?", "answer": "x", "type": "bridge", "level": "hard",
        "supporting_facts": [["A", 0], ["B", 1]], "context": [["A", ["a."]], ["B", ["b.", " x."]], ["C", ["c."]]],
    }  # fmt: skip
    (tmp_path / HOTPOTQA_100).write_text(json.dumps([record]))
    (question,), documents = hotpotqa_100(str(tmp_path))
    assert (question.support, question.evidence, len(documents)) == (("A", "B"), ("a.", "x."), 3)


@pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set")
def test_the_sets_as_published() -> None:
    questions, documents = hotpotqa_100()
    assert (len(questions), len(documents)) == (100, 994)
    assert not {question.text for question in questions} & {question.text for question in hotpotqa()[0]}
    questions, documents = two_wiki()
    assert (len(questions), len(documents)) == (101, 6119)
    assert {len(question.support) for question in questions} == {2, 4}
