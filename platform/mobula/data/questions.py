"""Questions that take several documents to answer, with the paragraphs they were asked about."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobula.data.records import Document
from mobula.data.sources import read_text, require_folder
from mobula.errors import BadRecord, DataError

HOTPOTQA = "hotpot_train.json"


@dataclass(frozen=True)
class Question:
    """A question, its answers (the first is the target), and the ids of the documents that support them.

    ``kind`` is the set's own name for how the documents hang together (``bridge``, ``comparison``). ``evidence`` has,
    where the set marks it, the first supporting sentence of each of these documents.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    support: tuple[str, ...]
    kind: str = ""
    evidence: tuple[str, ...] = ()


def hotpotqa(path: str = "") -> tuple[list[Question], list[Document]]:
    """500 training questions of HotpotQA (Yang et al. 2018, arXiv 1809.09600) and all their paragraphs as one corpus.

    A paragraph's id is its title; of paragraphs that share one, the first is kept. ``path`` is the folder that holds
    hotpot_train.json; empty: MOBULA_DATA.

    Raises:
        DataError: if the file is missing or damaged.
    """
    file = require_folder("hotpotqa", path, HOTPOTQA, subfolder="hotpotqa_500")[0] / HOTPOTQA
    try:
        records = json.loads(read_text(file))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    documents: dict[str, Document] = {}
    questions = []
    for number, record in enumerate(records, 1):
        questions.append(_question(record, file, number))
        for title, sentences in record["context"]:
            documents.setdefault(title, Document(title, title, "".join(sentences)))
    return questions, list(documents.values())


def _question(record: dict[str, Any], file: Path, number: int) -> Question:
    try:
        support = tuple(dict.fromkeys(title for title, _ in record["supporting_facts"]))
        known = dict(record["context"])
        question = Question(record["_id"], record["question"], (record["answer"],), support, record["type"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadRecord(f"{file}, record {number}: not a record of HotpotQA ({error!r})") from error
    if not set(support) <= set(known):
        raise BadRecord(
            f"{file}, record {number}: supporting paragraphs {set(support) - set(known)} are not in context"
        )
    first = dict(reversed(record["supporting_facts"]))
    # A few records mark a sentence that their paragraph does not have.
    sentences = (known[title][first[title] : first[title] + 1] for title in support)
    return replace(question, evidence=tuple("".join(found).strip() for found in sentences))
