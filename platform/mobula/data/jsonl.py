"""Questions and passages of the user's own: a folder of JSON lines.

``corpus.jsonl``: ``{"id", "title", "text"}`` (the title may be missing), or ``{"id", "contents"}`` with the title on
the first line. ``train.jsonl``, ``dev.jsonl``, ``test.jsonl``: ``{"id", "question", "golden_answers": [...]}``, the
first answer being the target; where it is known also ``support``, the ids of the passages that settle the question, in
their order, ``steps``, of each of these what to look up and the words that settle it (``[["query", "fact"], ...]``),
and ``kind``. Other fields are not read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mobula.data.questions import Question
from mobula.data.records import Document
from mobula.data.sources import read_jsonl, text_field
from mobula.errors import BadRecord, DataError

JSONL = "jsonl"  # the name of the source in configs
CORPUS = "corpus.jsonl"
SPLITS = ("train", "dev", "test")
FEWEST = {"train": 1, "dev": 2, "test": 2}


def corpus_file(path: str) -> Path | None:
    """The corpus of a folder; None if it has none, so that a served retriever must have the passages."""
    file = Path(path).expanduser() / CORPUS
    return file if file.is_file() else None


def read_passages(file: Path, start: int = 0, end: int | None = None, first: int = 1) -> Iterator[tuple[int, Document]]:
    """(line number, passage) one after another. Whether ids are given twice is for the caller to see.

    ``start``, ``end``, ``first``: of a part of the file, as :func:`mobula.data.sources.read_jsonl`.

    Raises:
        DataError: if the file is missing.
        BadRecord: naming file, line and field.
    """
    for number, row in read_jsonl(file, start, end, first):
        yield number, _passage(row, f"{file}, line {number}")


def load_passages(path: str) -> list[Document]:
    """The passages of a folder.

    Raises:
        DataError: if it has no corpus.jsonl, or an empty one.
        BadRecord: naming file, line and field, or an id that is given twice.
    """
    file = corpus_file(path)
    if file is None:
        raise DataError(
            f"data.path={path}: no {CORPUS} there; add it, or name who has the passages: an index "
            "(retrieve.index) or a served retriever (retrieve.url)"
        )
    lines: dict[str, int] = {}
    documents = []
    for number, document in read_passages(file):
        if document.id in lines:
            raise twice(file, number, document.id, lines[document.id])
        lines[document.id] = number
        documents.append(document)
    if not documents:
        raise DataError(f"{file}: no passage in it")
    return documents


def twice(file: Path, line: int, id: str, before: object) -> BadRecord:
    """The error for an id that is given again."""
    return BadRecord(f"{file}, line {line}: the id {id!r} is that of line {before} too; ids must differ")


@lru_cache(maxsize=4)
def load_questions(path: str) -> Mapping[str, list[Question]]:
    """The questions of a folder by split.

    Raises:
        DataError: if a file is missing or has too few questions.
        BadRecord: naming file, line and field, or an id that is given twice.
    """
    known: dict[str, str] = {}
    return {split: _questions(Path(path).expanduser() / f"{split}.jsonl", known) for split in SPLITS}


def divided(
    path: str, sizes: Mapping[str, int | None], seed: int, *, supported: bool = False
) -> dict[str, list[Question]]:
    """The questions of a folder as an experiment divides them, each file in an order that the seed decides.

    ``sizes``: how many questions a split has; null: all that there are. The first split has no file of its own: it
    comes out of train.jsonl and, if ``supported``, has such questions alone as name their supporting passages.

    Raises:
        DataError: if there are not as many.
    """
    left = {name: _shuffled(part, f"{seed} {name}") for name, part in load_questions(path).items()}
    start = next(iter(sizes))
    fitting = [question for question in left["train"] if question.support or not supported]
    what = "questions that name their support" if supported else "questions"
    result = {start: _first(fitting, start, sizes[start], f"{path}/train.jsonl has {len(fitting)} {what}")}
    taken = {question.id for question in result[start]}
    left["train"] = [question for question in left["train"] if question.id not in taken]
    for split in SPLITS:
        besides = f", beside the {len(taken)} of data.{start}" if split == "train" else ""
        there = f"{path}/{split}.jsonl has {len(left[split])} questions{besides}"
        result[split] = _first(left[split], split, sizes[split], there)
    return result


def _first(questions: list[Question], split: str, size: int | None, there: str) -> list[Question]:
    least = FEWEST.get(split, 1) if size is None else size
    if len(questions) < least:
        raise DataError(f"data.{split}: {least} questions are needed; {there}")
    return questions[:size]


def size_problems(source: str, path: str, sizes: Mapping[str, int | None]) -> Iterator[str]:
    """Contradictions of a data section: what this source needs, and what no other understands."""
    start = next(iter(sizes))
    if source == JSONL and not path:
        yield f"path is empty, but source={JSONL} needs a folder with {CORPUS}, train.jsonl, dev.jsonl and test.jsonl"
    for split, size in sizes.items():
        if size is None and (source != JSONL or split == start):
            yield f"{split}=null: say how many questions" + ("" if split == start else f"; all needs source={JSONL}")


def require_support(support: Mapping[str, Sequence[str]], known: Container[str], where: str) -> None:
    """Check that the passages which support questions, by question, are there.

    Raises:
        BadRecord: naming the first question and passage.
    """
    for question, ids in support.items():
        if missing := [id for id in ids if id not in known]:
            raise BadRecord(f"question {question!r}: its supporting passage {missing[0]!r} is not in {where}")


def _passage(row: dict[str, Any], where: str) -> Document:
    id = text_field(row, ("id",), where)
    if "contents" not in row:
        title = text_field(row, ("title",), where, optional=True)
        return Document(id, title, text_field(row, ("text", "contents"), where))
    if "text" in row:
        raise BadRecord(f"{where}: give either field contents or field text")
    document = Document.of_contents(id, text_field(row, ("contents",), where))
    if not document.text.strip():
        raise BadRecord(f"{where}: field contents has a title and no text behind it")
    return document


def _questions(file: Path, known: dict[str, str]) -> list[Question]:
    if not file.is_file():
        raise DataError(f"{file}: missing; questions are in {', '.join(f'{split}.jsonl' for split in SPLITS)}")
    questions = []
    for number, row in read_jsonl(file):
        where = f"{file}, line {number}"
        question = _question(row, where)
        if question.id in known:
            raise BadRecord(f"{where}: the id {question.id!r} is that of {known[question.id]} too; ids must differ")
        known[question.id] = where
        questions.append(question)
    return questions


def _question(row: dict[str, Any], where: str) -> Question:
    id, text = (text_field(row, (name,), where) for name in ("id", "question"))
    answers = tuple(dict.fromkeys(_texts(row.get("golden_answers"), "golden_answers", where)))
    if not answers:
        raise BadRecord(f"{where}: field golden_answers is empty; a question needs at least one answer")
    if wordless := [answer for answer in answers if not re.search(r"\w", answer)]:
        raise BadRecord(f"{where}: field golden_answers: {wordless[0]!r} has neither letter nor digit")
    support = tuple(dict.fromkeys(_texts(row.get("support", []), "support", where)))
    kind = text_field(row, ("kind",), where, optional=True)
    steps = _steps(row.get("steps", []), where)
    if steps and len(steps) != len(support):
        raise BadRecord(f"{where}: {len(steps)} steps for {len(support)} supporting passages; expected one for each")
    return Question(id, text, answers, support, kind, steps=steps)


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    """Whole numbers become text."""
    if not isinstance(value, list) or not all(isinstance(v, str | int) and not isinstance(v, bool) for v in value):
        raise BadRecord(f"{where}: field {name} must be a list of texts, found {value!r}")
    return tuple(map(str, value))


def _steps(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise BadRecord(f"{where}: field steps must be a list of pairs [query, fact], found {value!r}")
    pairs = [_texts(step, "steps", where) if isinstance(step, list) else () for step in value]
    if wrong := [step for step, pair in zip(value, pairs, strict=True) if len(pair) != 2 or not all(pair)]:
        raise BadRecord(f"{where}: field steps: expected a pair of texts [query, fact], found {wrong[0]!r}")
    return tuple((query, fact) for query, fact in pairs)


def _shuffled(questions: list[Question], seed: str) -> list[Question]:
    return random.Random(seed).sample(questions, len(questions))
