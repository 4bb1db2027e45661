"""Questions with answers, and the passages that they come with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobula.data.records import Document
from mobula.data.sources import hub_rows, read_text, require_folder
from mobula.errors import BadRecord, DataError

HOTPOTQA, NATURAL, SQUAD = "hotpot_train.json", "nq_generator_training.json", "squad_v2.0.json"
_PASSAGE = re.compile(r"\[\d+\] Title: (.*?) Text: (.*)", re.DOTALL)
_NEXT = re.compile(r"\n(?=\[\d+\] Title: )")


@dataclass(frozen=True)
class Question:
    """A question, its answers (the first is the target), and the ids of the documents that support them.

    ``support`` is empty where nobody says which they are. ``kind`` is the set's own name for how the documents hang
    together (``bridge``, ``comparison``). ``passages``: ids of the documents that the question comes with, support and
    distractors. ``evidence`` has, where the set marks it, the first supporting sentence of each supporting document.
    ``steps`` has, where the set divides the question, a sub-question and its answer for each of them.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    support: tuple[str, ...]
    kind: str = ""
    passages: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    steps: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Reading:
    """A question about a text, and where the answer stands in it (characters, end excluded)."""

    question: str
    text: str
    start: int
    end: int


Loaded = tuple[list[Question], list[Document]]


def hotpotqa(path: str = "") -> Loaded:
    """Questions of HotpotQA (Yang et al. 2018, arXiv 1809.09600) and all their paragraphs as one corpus.

    A paragraph's id is its title; of paragraphs that share one, the first is kept. ``path`` is the folder that holds
    hotpot_train.json (500 training questions), or hotpotqa/hotpot_qa of the Hugging Face hub; empty: MOBULA_DATA.

    Raises:
        DataError: if the file is missing or damaged.
    """
    if _is_hub(path):
        rows = enumerate(hub_rows(path, "distractor", "train"), 1)
        return hotpotqa_questions(((f"{path}, row {number}", _as_file(row)) for number, row in rows))
    file = require_folder("hotpotqa", path, HOTPOTQA, subfolder="hotpotqa_500")[0] / HOTPOTQA
    return hotpotqa_questions((f"{file}, record {number}", record) for number, record in enumerate(records_of(file), 1))


def natural_questions(path: str = "") -> Loaded:
    """Natural Questions (Kwiatkowski et al., TACL 2019) with the passages that they come with, as one corpus.

    Which passages support an answer is not known. ``path`` is the folder that holds nq_generator_training.json (1,000
    questions with 5 retrieved passages each, within prompts), or Tevatron/wikipedia-nq of the Hugging Face hub, whose
    judged passages count as support; empty: MOBULA_DATA.

    Raises:
        DataError: if the file is missing or damaged.
    """
    if _is_hub(path):
        return _judged(path)
    file = require_folder("nq", path, NATURAL, subfolder="nq")[0] / NATURAL
    documents: dict[str, Document] = {}
    questions = []
    for number, record in enumerate(records_of(file), 1):
        where = f"{file}, record {number}"
        try:
            text, passages = _parted(record["prompt"])
            question = Question(str(record["query_id"]), text, (record["response"],), (), passages=tuple(passages))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadRecord(f"{where}: not a question with passages ({error!r})") from error
        documents.update(passages)
        questions.append(_sound(question, where))
    return questions, list(documents.values())


def squad(path: str = "") -> list[Reading]:
    """Answered questions of SQuAD 2.0 (Rajpurkar et al. 2018), 1,978 of them.

    ``path`` is the folder that holds squad_v2.0.json; empty: MOBULA_DATA.

    Raises:
        DataError: if the file is missing or damaged.
    """
    file = require_folder("squad", path, SQUAD, subfolder="squad")[0] / SQUAD
    examples = []
    for number, record in enumerate(records_of(file), 1):
        try:
            start, end = record["answer_span"]
            reading = Reading(record["question"], record["context"], start, end)
            if reading.text[start:end].lower() != record["answer"].lower():
                raise ValueError("the answer is not where answer_span says")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadRecord(f"{file}, record {number}: not a question about a text ({error!r})") from error
        examples.append(reading)
    return examples


def _is_hub(path: str) -> bool:
    """Whether a path is an id of the Hugging Face hub: owner/name, and no folder."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def records_of(file: Path) -> list[Any]:
    """The records of a JSON file.

    Raises:
        DataError: if it is not a list of them.
    """
    try:
        records = json.loads(read_text(file))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    if not isinstance(records, list):
        raise DataError(f"{file}: expected a list of records, found {type(records).__name__}")
    return records


def _sound(question: Question, where: str) -> Question:
    if not question.text.strip() or not any(re.search(r"\w", answer) for answer in question.answers[:1]):
        raise BadRecord(f"{where}: a question needs a text and an answer with letters or digits")
    return question


def _parted(prompt: str) -> tuple[str, dict[str, Document]]:
    """The question and the passages of a prompt; a passage's id is a hash of its title and text."""
    context, _, rest = prompt.rpartition("\nQuestion: ")
    question = rest.partition("\nYour answer:")[0].strip()
    passages = {}
    for line in _NEXT.split(context)[1:]:  # instructions come first
        match = _PASSAGE.fullmatch(line)
        if match is None:
            raise ValueError(f"passage without title or text: {line[:60]!r}")
        # Quotation marks are doubled, as in tables, and titles of several words stand in some.
        title, text = (part.strip().replace('""', '"') for part in match.groups())
        title = title.removeprefix('"').removesuffix('"')
        id = hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:12]
        passages[id] = Document(id, title, text)
    if not passages:
        raise ValueError("no passages")
    return question, passages


def hotpotqa_questions(records: Iterable[tuple[str, dict[str, Any]]]) -> Loaded:
    """Questions of records in the form of HotpotQA's files, each with what names it in an error, and their paragraphs.

    Raises:
        BadRecord: for one in another form.
    """
    documents: dict[str, Document] = {}
    questions = []
    for where, record in records:
        questions.append(_question(record, where))
        for title, sentences in record["context"]:
            documents.setdefault(title, Document(title, title, "".join(sentences)))
    return questions, list(documents.values())


def _question(record: dict[str, Any], where: str) -> Question:
    try:
        support = tuple(dict.fromkeys(title for title, _ in record["supporting_facts"]))
        known = dict(record["context"])
        question = Question(
            record["_id"], record["question"], (record["answer"],), support, record["type"], tuple(known)
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadRecord(f"{where}: not a record of HotpotQA ({error!r})") from error
    if not set(support) <= set(known):
        raise BadRecord(f"{where}: supporting paragraphs {set(support) - set(known)} are not in context")
    first = dict(reversed(record["supporting_facts"]))
    # A few records mark a sentence that their paragraph does not have.
    sentences = (known[title][first[title] : first[title] + 1] for title in support)
    return replace(question, evidence=tuple("".join(sentence).strip() for sentence in sentences))


def _as_file(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the hub's HotpotQA in the form of its files."""
    facts, context = row["supporting_facts"], row["context"]
    return {
        "_id": row["id"],
        "question": row["question"],
        "answer": row["answer"],
        "type": row["type"],
        "supporting_facts": list(zip(facts["title"], facts["sent_id"], strict=True)),
        "context": list(zip(context["title"], context["sentences"], strict=True)),
    }


def _judged(name: str) -> Loaded:
    """Questions whose passages are judged, as Tevatron publishes them."""
    documents: dict[str, Document] = {}
    questions = []
    for number, row in enumerate(hub_rows(name, "default", "train"), 1):
        where = f"{name}, row {number}"
        try:
            judged = [
                [Document(str(p["docid"]), p.get("title") or "", p["text"]) for p in row[f"{kind}_passages"]]
                for kind in ("positive", "negative")
            ]
            answers = tuple(row["answers"])
            support, known = (tuple(d.id for d in passages) for passages in (judged[0], [*judged[0], *judged[1]]))
            question = Question(str(row["query_id"]), row["query"], answers, support, passages=known)
        except (AttributeError, KeyError, TypeError) as error:
            raise BadRecord(f"{where}: not a question with judged passages ({error!r})") from error
        documents.update({d.id: d for passages in judged for d in passages})
        questions.append(_sound(question, where))
    return questions, list(documents.values())
