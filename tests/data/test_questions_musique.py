"""MuSiQue's records: steps without open references, and paragraphs that can be told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mobula.data.questions import MUSIQUE, musique
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
