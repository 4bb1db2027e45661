"""Texts on disk, and passages by number and by id."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mobula.data.records import Document
from mobula.data.stored_passages import (
    PassagesById,
    PassagesWriter,
    StoredPassages,
    TableWriter,
    TextTable,
    encoded,
)
from mobula.errors import DataError


def table(folder: Path, texts: list[str]) -> TextTable:
    with TableWriter(folder, "texts") as writer:
        for text in texts:
            writer.add(text.encode())
    return TextTable(folder, "texts")


@pytest.mark.parametrize("texts", [[], [""], ["", "a", "", "äöü\n\0", "z"]])
def test_a_table_reads_what_was_written(tmp_path: Path, texts: list[str]) -> None:
    stored = table(tmp_path, texts)
    assert list(stored) == texts and len(stored) == len(texts)
    assert [stored[i] for i in range(-len(texts), len(texts))] == texts * 2 and stored[1:] == texts[1:]
    with pytest.raises(IndexError):
        stored[len(texts)]


def test_a_sorted_table_finds_every_text_and_no_other(tmp_path: Path) -> None:
    texts = sorted({"".join(letters) for n in range(4) for letters in itertools.product("aé\U0001f600", repeat=n)})
    stored = table(tmp_path, texts)
    assert [stored.find(text) for text in texts] == list(range(len(texts)))
    assert [stored.find(text) for text in ("b", "zz", "aa\0", "\ud800")] == [None] * 4


def test_passages_are_read_by_number_and_by_id(tmp_path: Path) -> None:
    documents = [Document("a", "", "text"), Document("b", "Title", "more\ntext"), Document("é", "T", "x")]
    with PassagesWriter(tmp_path) as writer:
        for document in documents:
            writer.add(*encoded(document, "here"))
    stored = StoredPassages(tmp_path)
    assert list(stored) == documents and stored[-1] == documents[2] and stored[:2] == documents[:2]
    by_id = PassagesById(stored)
    assert dict(by_id) == {document.id: document for document in documents}
    assert "c" not in by_id and 3 not in by_id
    with pytest.raises(KeyError):
        by_id["c"]


def test_half_a_surrogate_pair_is_named() -> None:
    with pytest.raises(DataError, match=r"corpus, line 7: '\\ud800' is half of a surrogate pair"):
        encoded(Document("a", "", "x\ud800"), "corpus, line 7")
