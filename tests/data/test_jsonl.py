"""Questions and passages of the user's own: what is read, and what is refused with file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mobula.data.jsonl import corpus_file, divided, load_passages, load_questions, require_support
from mobula.data.records import Document
from mobula.errors import BadRecord, DataError

PASSAGES = [{"id": f"p{i}", "title": f"T{i}", "text": f"text {i}"} for i in range(3)]
QUESTION = {"id": "q", "question": "who?", "golden_answers": ["Ada", "Ada L."]}


def rows_of(prefix: str, count: int, **more: Any) -> list[dict[str, Any]]:
    return [{**QUESTION, "id": f"{prefix}{i}", **more} for i in range(count)]


def write(folder: Path, **files: Any) -> str:
    """A folder of question files, each with two questions unless rows are given."""
    rows = {"corpus": PASSAGES, **{split: rows_of(split, 2) for split in ("train", "dev", "test")}, **files}
    for name, part in rows.items():
        lines = part if isinstance(part, str) else "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


def test_passages_have_title_and_text_or_contents(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "text": "alone"},
        {"id": "b", "contents": '"Manta \u2028 rays"\nThey swim.\nFar.'},
        {"id": "c", "contents": "Rays\nThey swim."},
        {"id": "d", "contents": "one line"},
    ]
    texts = [(d.id, d.title, d.text) for d in load_passages(write(tmp_path, corpus=rows))]
    assert texts == [
        ("7", "", "alone"),
        ("b", "Manta \u2028 rays", "They swim.\nFar."),
        ("c", "Rays", "They swim."),
        ("d", "", "one line"),
    ]


@pytest.mark.parametrize("title", ["", "Rays", 'The "Big" O', '"', "one\ntwo"])
def test_contents_are_read_as_they_were_written(title: str) -> None:
    again = Document.of_contents("a", Document("a", title, "They\nswim.").contents)
    assert (again.title, again.text) == (" ".join(title.split()), "They\nswim.")


@pytest.mark.parametrize(
    ("corpus", "reason"),
    [
        ([*PASSAGES, PASSAGES[1]], "corpus.jsonl, line 4: the id 'p1' is that of line 2 too"),
        ([{"title": "T", "text": "x"}], "line 1: field id must be text, found None"),
        ([*PASSAGES, {"id": "x"}], "line 4: field text must be text"),
        ([{"id": "x", "text": "a", "contents": "b"}], "either field contents or field text"),
        ([{"id": "x", "contents": '"T"\n '}], "a title and no text"),
        ('{"id": "x", "text": "a"}\n\n{"id": ', "line 3: not JSON"),
        ("[1]", "line 1: expected a JSON object"),
        ("", "no passage in it"),
    ],
)
def test_damaged_passages_are_named(tmp_path: Path, corpus: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load_passages(write(tmp_path, corpus=corpus))


def test_what_is_not_utf8_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    rows = b"".join(b'{"id": "x%d", "text": "a"}\n' % i for i in range(3))
    (tmp_path / "corpus.jsonl").write_bytes(rows + b'{"id": "y", "text": "\xff"}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl, line 4: not UTF-8"):
        load_passages(str(tmp_path))


def test_questions_have_answers_and_may_have_support_and_steps(tmp_path: Path) -> None:
    rich = {"support": ["p1", "p0"], "steps": [["T1", "T1"], ["T0", "a fact"]], "kind": "bridge", "more": 1}
    plain = {"id": 3, "question": "when?", "golden_answers": [1969, "1969", "the year 1969"]}
    first, second = load_questions(write(tmp_path, train=[{**QUESTION, **rich}, plain]))["train"]
    assert (first.id, first.text, first.answers, first.kind) == ("q", "who?", ("Ada", "Ada L."), "bridge")
    assert first.support == ("p1", "p0") and first.steps == (("T1", "T1"), ("T0", "a fact"))
    assert (second.id, second.answers, second.support, second.steps) == ("3", ("1969", "the year 1969"), (), ())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": None}, "dev.jsonl, line 2: field question must be text"),
        ({"golden_answers": []}, "line 2: field golden_answers is empty"),
        ({"golden_answers": "Ada"}, "golden_answers must be a list of texts, found 'Ada'"),
        ({"golden_answers": [["Ada"]]}, "golden_answers must be a list of texts"),
        ({"golden_answers": ["Ada", "?!"]}, "'\\?!' has neither letter nor digit"),
        ({"support": "p1"}, "support must be a list of texts"),
        ({"support": ["p1"], "steps": [["a", "b"], ["c", "d"]]}, "2 steps for 1 supporting"),
        ({"support": ["p1"], "steps": [["a"]]}, r"a pair of texts \[query, fact\], found \['a'\]"),
        ({"support": ["p1"], "steps": "a"}, "steps must be a list of pairs"),
        ({"id": "train1"}, "dev.jsonl, line 2: the id 'train1' is that of .*train.jsonl, line 2 too"),
    ],
)
def test_damaged_questions_are_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        load_questions(write(tmp_path, dev=[{**QUESTION, "id": "good"}, {**QUESTION, **change}]))


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"dev.jsonl: missing; questions are in train.jsonl, dev.jsonl, test.jsonl"):
        load_questions(str(tmp_path))
    (tmp_path / "corpus.jsonl").unlink()
    assert corpus_file(str(tmp_path)) is None
    with pytest.raises(DataError, match=r"no corpus.jsonl there.*retrieve.url"):
        load_passages(str(tmp_path))


def sizes(**changes: Any) -> dict[str, int | None]:
    return {"warm_up": 2, "train": None, "dev": None, "test": None, **changes}


def test_splits_are_the_files_and_the_first_comes_out_of_train(tmp_path: Path) -> None:
    path = write(tmp_path, train=[*rows_of("a", 5), *rows_of("b", 3, support=["p1"])], test=rows_of("test", 9))
    ids = {split: [q.id for q in part] for split, part in divided(path, sizes(test=4), 0, supported=True).items()}
    assert list(ids) == ["warm_up", "train", "dev", "test"]
    assert len(ids["warm_up"]) == 2 and all(id.startswith("b") for id in ids["warm_up"])
    assert sorted([*ids["warm_up"], *ids["train"]]) == [*(f"a{i}" for i in range(5)), *(f"b{i}" for i in range(3))]
    assert sorted(ids["dev"]) == ["dev0", "dev1"] and len(ids["test"]) == 4
    again, other = (divided(path, sizes(test=4), seed, supported=True) for seed in (0, 1))
    assert [q.id for q in again["test"]] == ids["test"] != [q.id for q in other["test"]]
    assert {q.id[0] for q in divided(path, sizes(warm_up=7), 0)["warm_up"]} == {"a", "b"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"warm_up": 4}, "data.warm_up: 4 questions are needed; .*train.jsonl has 3 questions that name their support"),
        ({"train": 7}, "data.train: 7 questions are needed; .*train.jsonl has 6 questions, beside the 2 of data.warm"),
        ({"test": 3}, "data.test: 3 questions are needed; .*test.jsonl has 2 questions"),
    ],
)
def test_more_questions_than_there_are_is_an_error(tmp_path: Path, change: dict[str, int], reason: str) -> None:
    path = write(tmp_path, train=[*rows_of("a", 5), *rows_of("b", 3, support=["p1"])])
    with pytest.raises(DataError, match=reason):
        divided(path, sizes(**change), 0, supported=True)


def test_a_split_of_one_question_has_no_interval(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.dev: 2 questions are needed"):
        divided(write(tmp_path, train=rows_of("t", 3), dev=rows_of("d", 1)), sizes(), 0)


def test_supporting_passages_must_be_there() -> None:
    require_support({"q": ["p1"]}, {"p1"}, "here")
    with pytest.raises(BadRecord, match="question 'q': its supporting passage 'p2' is not in here"):
        require_support({"q": ["p1", "p2"]}, {"p1"}, "here")
