"""Small published sets of questions that need several passages: files of one folder of MOBULA_DATA."""

from __future__ import annotations

import re
from typing import Any

from mobula.data.questions import Loaded, Question, hotpotqa_questions, records_of
from mobula.data.records import Document
from mobula.data.sources import require_folder
from mobula.errors import BadRecord

SUBFOLDER = "multihop_small"
HOTPOTQA_100, MUSIQUE, TWO_WIKI = "hotpotqa_train.json", "musique_train.json", "2wikimultihopqa_101.json"
TWO_WIKI_CORPUS = "2wikimultihopqa_corpus.json"
_REFERENCE = re.compile(r"#(\d+)")


def hotpotqa_100(path: str = "") -> Loaded:
    """100 training questions of HotpotQA that are not among the 500 of :func:`mobula.data.questions.hotpotqa`.

    ``path`` is the folder that holds hotpotqa_train.json; empty: MOBULA_DATA.

    Raises:
        DataError: if the file is missing or damaged.
    """
    file = require_folder("hotpotqa_100", path, HOTPOTQA_100, subfolder=SUBFOLDER)[0] / HOTPOTQA_100
    return hotpotqa_questions((f"{file}, record {number}", record) for number, record in enumerate(records_of(file), 1))


def two_wiki(path: str = "") -> Loaded:
    """101 questions of 2WikiMultihopQA (Ho et al. 2020, arXiv 2011.01060) and 6,119 passages: for retrieval alone.

    A passage's id is its title. Which ones support a question is known, its answer is not. ``path`` is the folder that
    holds both files; empty: MOBULA_DATA.

    Raises:
        DataError: if a file is missing or damaged.
    """
    folder = require_folder("two_wiki", path, TWO_WIKI, subfolder=SUBFOLDER)[0]
    try:
        documents = [Document(row["title"], row["title"], row["text"]) for row in records_of(folder / TWO_WIKI_CORPUS)]
        rows = enumerate(records_of(folder / TWO_WIKI))
        questions = [Question(str(n), row["question"], (), tuple(row["ground_truth"])) for n, row in rows]
    except (KeyError, TypeError) as error:
        raise BadRecord(f"{folder}: not the records of 2WikiMultihopQA ({error!r})") from error
    missing = {id for question in questions for id in question.support} - {document.id for document in documents}
    if missing:
        raise BadRecord(f"{folder / TWO_WIKI}: supporting passages {sorted(missing)[:3]} are not in {TWO_WIKI_CORPUS}")
    return questions, documents


def musique(path: str = "") -> Loaded:
    """100 questions of MuSiQue (Trivedi et al. 2022, arXiv 2108.00573), divided into steps, and all their paragraphs.

    A paragraph's id is its title, with a number where several share one. ``path`` is the folder that holds
    musique_train.json; empty: MOBULA_DATA.

    Raises:
        DataError: if the file is missing or damaged.
    """
    file = require_folder("musique", path, MUSIQUE, subfolder=SUBFOLDER)[0] / MUSIQUE
    documents: dict[tuple[str, str], Document] = {}
    named: dict[str, int] = {}
    questions = []
    for number, record in enumerate(records_of(file), 1):
        try:
            ids = []
            for paragraph in record["paragraphs"]:
                title, text = paragraph["title"], paragraph["paragraph_text"]
                if (title, text) not in documents:
                    named[title] = named.get(title, 0) + 1
                    id = title if named[title] == 1 else f"{title} ({named[title]})"
                    documents[title, text] = Document(id, title, text)
                ids.append(documents[title, text].id)
            questions.append(_divided(record, ids))
        except (KeyError, TypeError, IndexError) as error:
            raise BadRecord(f"{file}, record {number}: not a record of MuSiQue ({error!r})") from error
    return questions, list(documents.values())


def _divided(record: dict[str, Any], ids: list[str]) -> Question:
    """A question of MuSiQue; in its steps, #n is replaced by the answer of the n-th."""
    parts = record["question_decomposition"]
    step_answers = [part["answer"] for part in parts]
    steps = tuple(
        (_REFERENCE.sub(lambda match: step_answers[int(match[1]) - 1], part["question"]), part["answer"])
        for part in parts
    )
    support = tuple(ids[part["paragraph_support_idx"]] for part in parts)
    answers = (record["answer"], *record["answer_aliases"])
    kind = f"{len(parts)}-hop"
    return Question(record["id"], record["question"], answers, support, kind, tuple(ids), steps=steps)
