"""``functions``: find the right tool for a request (Berkeley Function Calling Leaderboard, BFCL v4).

Documents: every function that a single-turn category offers, those of the irrelevance and relevance
categories included (they are distractors), merged by name; of several definitions the longest is kept. A document's
``source`` is the category that offers it first.
Requests: the user's words in the ten single-turn categories that have gold calls; the gold functions are the
names that are called, so a request for parallel calls may have several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from mobula.data.config import DataConfig
from mobula.data.duplicates import split_words
from mobula.data.records import Document, Query
from mobula.data.sources import UNSPLIT, Collection, find_folder, read_jsonl
from mobula.errors import BadRecord, DataError

_STEMMER = Stemmer.Stemmer("english")
PACKAGE = "bfcl-eval"
WITH_GOLD = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
)
DISTRACTORS = ("irrelevance", "live_irrelevance", "live_relevance")


def load(config: DataConfig) -> Collection:
    """Read the functions and requests from a folder or from the installed package (without importing it).

    Raises:
        DataError: if the files are nowhere to be found.
        BadRecord: for a request without gold calls, or whose gold call names a function that is not offered.
    """
    folder, source = _folder(config.path)
    definitions: dict[str, list[dict[str, Any]]] = {}
    offered: dict[str, str] = {}
    queries: list[Query] = []
    for category in (*WITH_GOLD, *DISTRACTORS):
        for number, record in read_jsonl(folder / f"BFCL_v4_{category}.json"):
            for function in _functions(record, f"BFCL_v4_{category}.json, line {number}"):
                definitions.setdefault(function["name"], []).append(function)
                offered.setdefault(function["name"], category)
    for request in requests(config.path):
        gold = tuple(dict.fromkeys(name for call in request.calls for name in call))
        queries.append(Query(request.id, request.text, gold))
    documents = [_document(name, versions, offered[name]) for name, versions in definitions.items()]
    notes: dict[str, float | str] = {
        "definitions": sum(len({json.dumps(d, sort_keys=True) for d in versions}) for versions in definitions.values()),
        "functions with a request": len({g for q in queries for g in q.gold}),
        "requests with several gold functions": sum(len(q.gold) > 1 for q in queries),
    }
    return Collection(source, documents, {UNSPLIT: queries}, notes)


def _folder(path: str) -> tuple[Path, str]:
    needed = f"BFCL_v4_{WITH_GOLD[0]}.json"
    located = find_folder("functions", path, needed, subfolder="functions")
    if located is not None:
        return located
    spec = util.find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"data set functions not found: package {PACKAGE} is not installed; "
            f"run `pip install --no-deps {PACKAGE}==2026.3.23`, or set data.path"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    if not (folder / needed).is_file():
        raise DataError(f"data set functions: {PACKAGE} {metadata.version(PACKAGE)} has no data/{needed}; reinstall it")
    return folder, f"package {PACKAGE} {metadata.version(PACKAGE)}"


def _functions(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    functions = record.get("function")
    if not isinstance(functions, list):
        raise BadRecord(f"{where}: field function must be a list, found {type(functions).__name__}")
    for function in functions:
        if not isinstance(function, dict) or not function.get("name"):
            raise BadRecord(f"{where}: field function has an entry without a name")
    return functions


@dataclass(frozen=True)
class Request:
    """A request with the functions it is offered, as BFCL defines them, and its gold calls.

    A call is ``{function: {parameter: accepted values}}``.
    """

    id: str
    category: str
    text: str
    functions: list[dict[str, Any]]
    calls: list[dict[str, dict[str, list[Any]]]]


def requests(path: str = "", categories: Sequence[str] = WITH_GOLD) -> Iterator[Request]:
    """The requests of categories that have gold calls.

    Raises:
        DataError: if the files are nowhere to be found.
        BadRecord: for a request without gold calls, or whose gold call names a function that is not offered.
    """
    folder, _ = _folder(path)
    for category in categories:
        answers = folder / "possible_answer" / f"BFCL_v4_{category}.json"
        calls = {record["id"]: record["ground_truth"] for _, record in read_jsonl(answers)}
        questions = folder / f"BFCL_v4_{category}.json"
        for number, record in read_jsonl(questions):
            where = f"{questions.name}, line {number}"
            gold = calls.get(record["id"], [])
            if not gold:
                raise BadRecord(f"{where}: request {record['id']} has no gold call in {answers.name}")
            functions = _functions(record, where)
            unknown = {name for call in gold for name in call} - {function["name"] for function in functions}
            if unknown:
                raise BadRecord(f"{where}: gold function {min(unknown)} is not among the functions offered")
            yield Request(record["id"], category, _user_text(record), functions, gold)


def _user_text(record: dict[str, Any]) -> str:
    messages = [message for turn in record["question"] for message in turn]
    return "\n".join(message["content"] for message in messages if message["role"] == "user").strip()


def _document(name: str, definitions: list[dict[str, Any]], category: str) -> Document:
    texts = [_describe(definition) for definition in definitions]
    return Document(name, readable(name), max(texts, key=len), source=category)


def _describe(function: dict[str, Any]) -> str:
    lines = [str(function.get("description", "")).strip()]
    lines.extend(_parameters(function.get("parameters", {})))
    return "\n".join(line for line in lines if line)


def _parameters(schema: dict[str, Any]) -> Iterator[str]:
    """One line per parameter, nested ones included: its name in words and its description."""
    for name, value in (schema.get("properties") or {}).items():
        if not isinstance(value, dict):
            yield readable(name)
            continue
        yield f"{readable(name)}: {value.get('description') or ''}".strip()
        yield from _parameters(value)
        if isinstance(value.get("items"), dict):
            yield from _parameters(value["items"])


def purpose(text: str) -> list[str]:
    """Stems of what a function's description says it does, without stop words and parameters."""
    words = split_words(text.partition("\n")[0])
    return _STEMMER.stemWords([word for word in words if word not in STOPWORDS_EN])


def readable(name: str) -> str:
    """An identifier as words: ``geo.findNearest_city`` becomes ``geo find Nearest city``."""
    return re.sub(r"[._\s]+", " ", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)).strip()
