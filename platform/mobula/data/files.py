"""A corpus of the user's own (JSONL or TREC files) and BEIR sets by Hugging Face id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mobula.artifacts import write_text
from mobula.data.config import DataConfig
from mobula.data.records import Document, Query, RetrievalData
from mobula.data.sources import (
    UNSPLIT,
    Collection,
    blocks,
    hub_rows,
    judged_query,
    read_jsonl,
    read_qrels,
    read_text,
    text_field,
)
from mobula.errors import BadRecord, DataError

SPLITS = ("train", "dev", "test")
NAMED = (*SPLITS, "given")


def load_files(config: DataConfig) -> Collection:
    """Read a folder in one of two layouts.

    JSONL: ``corpus.jsonl`` (``id`` or ``_id``, ``title``, ``text``, ``date``, ``source``) and ``queries.jsonl`` (``id``
    or ``_id``, ``text``, ``source_doc``, and ``gold``, a list of document ids with or without ``grades``, or else
    judgements beside it).
    TREC: ``documents.trec`` (``<DOC><DOCNO>``) and ``topics.trec`` (``<top><num><title>``).
    Judgements: ``qrels/train.tsv``, ``qrels/dev.tsv``, ``qrels/test.tsv`` (splits as given), or ``qrels.tsv`` or
    ``qrels.txt`` (queries are then divided). A query in ``queries.jsonl`` may name its ``split`` itself.

    Raises:
        DataError: if the folder has neither layout.
        BadRecord: naming file, line and field.
    """
    folder = Path(config.path).expanduser()
    if (folder / "corpus.jsonl").is_file():
        documents, texts, given, taken = _read_jsonl_layout(folder)
    elif (folder / "documents.trec").is_file():
        documents, texts = _read_trec_layout(folder)
        given, taken = {}, {}
    else:
        raise DataError(
            f"data.path={config.path}: holds neither corpus.jsonl nor documents.trec (see `mobula data list`)"
        )
    judged = _from_qrels(folder, texts).items()
    queries = {split: [replace(q, source_doc=taken.get(q.id)) for q in part] for split, part in judged} | given
    if not queries:
        raise DataError(
            f"{folder}: no relevance judgements; add qrels.txt, qrels/test.tsv or a field gold to the queries"
        )
    return Collection(f"path {config.path}", documents, queries)


def export(data: RetrievalData, folder: Path) -> None:
    """Write a corpus and its queries in the JSONL layout of :func:`load_files`."""
    documents = (asdict(document) for document in data.documents)
    write_text(folder / "corpus.jsonl", "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents))
    queries = ({**asdict(query), "split": split} for split, part in data.queries.items() for query in part)
    write_text(folder / "queries.jsonl", "".join(json.dumps(q, ensure_ascii=False) + "\n" for q in queries))


def load_beir(config: DataConfig) -> Collection:
    """Read a BEIR set (Thakur et al. 2021) by Hugging Face id, with or without a separate ``-qrels`` data set.

    Raises:
        DataError: if the id is unknown or, without a network, not in the local cache.
    """
    name = config.path
    documents = [
        Document(str(row["_id"]), row.get("title") or "", row["text"]) for row in hub_rows(name, "corpus", "corpus")
    ]
    texts = {str(row["_id"]): row["text"] for row in hub_rows(name, "queries", "queries")}
    queries = {}
    for split, rows in _hub_qrels(name):
        qrels: dict[str, dict[str, int]] = {}
        for row in rows:
            qrels.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = int(row["score"])
        queries[split] = _judged(texts, qrels, f"{name} {split}")
    return Collection(f"Hugging Face {name}", documents, queries)


def _read_jsonl_layout(
    folder: Path,
) -> tuple[list[Document], dict[str, str], dict[str, list[Query]], dict[str, str | None]]:
    """Documents; the texts of queries without gold; queries with gold by split; where the former were taken from."""
    documents = []
    for number, value in read_jsonl(folder / "corpus.jsonl"):
        where = f"{folder / 'corpus.jsonl'}, line {number}"
        id = text_field(value, ("id", "_id"), where)
        title, date, source = (text_field(value, (n,), where, optional=True) for n in ("title", "date", "source"))
        documents.append(Document(id, title, text_field(value, ("text",), where), date or None, source or None))
    texts: dict[str, str] = {}
    given: dict[str, list[Query]] = {}
    taken: dict[str, str | None] = {}
    for number, value in read_jsonl(folder / "queries.jsonl"):
        where = f"{folder / 'queries.jsonl'}, line {number}"
        id, text = text_field(value, ("id", "_id"), where), text_field(value, ("text",), where)
        source_doc = text_field(value, ("source_doc",), where, optional=True) or None
        if "gold" not in value:
            texts[id], taken[id] = text, source_doc
            continue
        split = text_field(value, ("split",), where, optional=True) or UNSPLIT
        if split not in (*NAMED, UNSPLIT):
            raise BadRecord(f"{where}: field split must be one of {', '.join(NAMED)}, found {split!r}")
        gold = _gold(value["gold"], where)
        grades = _grades(value.get("grades"), gold, where)
        given.setdefault(split, []).append(Query(id, text, gold, grades, source_doc))
    return documents, texts, given, taken


def _gold(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str | int) for v in value):
        raise BadRecord(f"{where}: field gold must be a list of at least one document id, found {value!r}")
    return tuple(dict.fromkeys(str(v) for v in value))


def _grades(value: Any, gold: tuple[str, ...], where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    whole = isinstance(value, list) and all(isinstance(v, int) and v > 0 for v in value)
    if not whole or len(value) != len(gold):
        raise BadRecord(f"{where}: field grades must be a list of {len(gold)} positive integers, found {value!r}")
    return tuple(value)


def _read_trec_layout(folder: Path) -> tuple[list[Document], dict[str, str]]:
    documents = [
        Document(_field(block, "docno"), _field(block, "title"), _field(block, "text") or _body(block))
        for block in blocks(read_text(folder / "documents.trec"), "doc")
    ]
    topics = blocks(read_text(folder / "topics.trec"), "top")
    return documents, {_field(topic, "num"): _field(topic, "title") for topic in topics}


def _field(block: str, tag: str) -> str:
    """A field's text; TREC topics may leave their fields unclosed (``<num> Number: 301``)."""
    match = re.search(rf"<{tag}>([^<]*)", block, flags=re.IGNORECASE)
    text = " ".join(match[1].split()) if match else ""
    return text.removeprefix("Number: ") if tag == "num" else text


def _body(block: str) -> str:
    without = re.sub(r"<(docno|title)>[^<]*</\1>", " ", block, flags=re.IGNORECASE)
    return " ".join(re.sub(r"<[^>]+>", " ", without).split())


def _from_qrels(folder: Path, texts: dict[str, str]) -> dict[str, list[Query]]:
    queries = {}
    for split in SPLITS:
        path = folder / "qrels" / f"{split}.tsv"
        if path.is_file():
            queries[split] = _judged(texts, read_qrels(path), str(path))
    single = next((folder / n for n in ("qrels.tsv", "qrels.txt") if (folder / n).is_file()), None)
    if single is not None and not queries:
        queries[UNSPLIT] = _judged(texts, read_qrels(single), str(single))
    return queries


def _judged(texts: dict[str, str], qrels: dict[str, dict[str, int]], where: str) -> list[Query]:
    unknown = [id for id in qrels if id not in texts]
    if unknown:
        raise BadRecord(f"{where}: judges query {unknown[0]!r}, which has no text among the queries")
    queries = (judged_query(id, texts[id], judged) for id, judged in qrels.items())
    return [query for query in queries if query is not None]


def _hub_qrels(name: str) -> Iterator[tuple[str, Any]]:
    """(our split name, judgements): ``BeIR/x`` keeps them in ``BeIR/x-qrels``, others in their default subset."""
    separate = name.startswith("BeIR/")
    for split, theirs in (("train", "train"), ("dev", "validation"), ("test", "test")):
        try:
            yield split, hub_rows(f"{name}-qrels" if separate else name, "default", theirs)
        except DataError:
            # Few BEIR sets have all three; one without test judgements is of no use.
            if split == "test":
                raise
