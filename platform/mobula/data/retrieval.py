"""From a ``data`` section to a corpus with disjoint splits of queries."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from mobula.data import classic, files, functions, streams
from mobula.data.config import DataConfig
from mobula.data.duplicates import identical, near_pairs, split_words
from mobula.data.pseudo_queries import body, hold_out_windows
from mobula.data.records import Document, Query, RetrievalData
from mobula.data.sources import UNSPLIT, Collection
from mobula.data.splits import divide, drop_leaks
from mobula.errors import BadRecord, DataError

DEFAULT_DEV_WINDOWS = 200


@dataclass(frozen=True)
class SetEntry:
    """A data set: how it is loaded, what it is, and where it comes from if no path is given.

    ``words`` are the words of a document's text by which it is compared with others.
    """

    load: Callable[[DataConfig], Collection]
    summary: str
    origin: str
    words: Callable[[str], Iterable[str]] = split_words


SETS = {
    "functions": SetEntry(
        functions.load, "find the right tool for a request (BFCL v4)", "package bfcl-eval", functions.purpose
    ),
    "scifact": SetEntry(classic.scifact, "abstracts that support or refute a claim", "MOBULA_DATA/scifact"),
    "vaswani": SetEntry(classic.vaswani, "physics abstracts and queries (NPL)", "MOBULA_DATA/vaswani_npl"),
    "cranfield": SetEntry(classic.cranfield, "aerodynamics abstracts and queries", "MOBULA_DATA/cranfield"),
    "cacm": SetEntry(classic.cacm, "dated computing abstracts 1958-79 and queries", "MOBULA_DATA/cacm"),
    "nq": SetEntry(classic.nq, "Natural Questions sample with Wikipedia passages", "MOBULA_DATA/nq"),
    "peps": SetEntry(streams.peps, "dated Python proposals and sentences that cite them", "MOBULA_DATA/peps"),
    "eips": SetEntry(streams.eips, "dated Ethereum proposals and sentences that cite them", "MOBULA_DATA/eips"),
    "pysec": SetEntry(streams.pysec, "dated Python advisories and their first sentences", "MOBULA_DATA/pysec"),
    "beir": SetEntry(files.load_beir, "a BEIR set by Hugging Face id (data.path)", "Hugging Face hub or its cache"),
    "files": SetEntry(files.load_files, "your own JSONL or TREC files (data.path)", "data.path"),
}


def load_retrieval(config: DataConfig, *, quiet: bool = False) -> RetrievalData:
    """Load a corpus and its queries, divided into splits that share no near-duplicate query.

    Prints one line that says which source was used, unless ``quiet``.

    Raises:
        DataError: if the set cannot be found or holds no usable query.
        BadRecord: for a record that breaks its schema.
    """
    collection = SETS[config.name].load(config)
    notes = dict(collection.notes)
    _validate(config.name, collection)
    documents = sorted(collection.documents, key=lambda d: by_number(d.id))
    queries, notes["queries given an identical document as further gold"] = _add_twins(documents, collection.queries)
    documents, queries, notes["queries whose documents were cut off"] = _limit(documents, queries, config)
    notes.update(_duplicate_facts(documents, queries, config))
    if config.queries == "titles":
        documents, queries = _ask_for_titles(documents, queries, config)
    queries = _divide(documents, queries, config)
    queries, notes["queries dropped as near-duplicates across splits"] = drop_leaks(queries, config.near_duplicate)
    if not queries.get("test"):
        raise DataError(f"data set {config.name}: no test query is left; check data.max_documents and the shares")
    data = RetrievalData(config.name, collection.source, fingerprint(documents, queries), documents, queries, notes)
    if not quiet:
        counts = ", ".join(f"{len(part):,} {split}" for split, part in queries.items())
        print(f"data: {config.name} from {data.source}: {len(documents):,} documents; queries: {counts}", flush=True)
    return data


def fingerprint(documents: list[Document], queries: dict[str, list[Query]]) -> str:
    """SHA-256 over documents and queries in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(dataclasses.astuple(document)).encode() + b"\n")
    for split in sorted(queries):
        for query in queries[split]:
            digest.update(json.dumps([split, *dataclasses.astuple(query)]).encode() + b"\n")
    return digest.hexdigest()


def _validate(name: str, collection: Collection) -> None:
    known: set[str] = set()
    for document in collection.documents:
        if not document.id or document.id in known:
            raise BadRecord(f"{name}, document {document.id!r}: field id is {'repeated' if document.id else 'empty'}")
        known.add(document.id)
    seen: set[str] = set()
    for split, queries in collection.queries.items():
        for query in queries:
            where = f"{name}, {split} query {query.id!r}"
            if query.id in seen:
                raise BadRecord(f"{where}: field id is repeated")
            seen.add(query.id)
            if not query.text.strip():
                raise BadRecord(f"{where}: field text is empty")
            if not query.gold:
                raise BadRecord(f"{where}: field gold is empty; every query needs a relevant document")
            missing = [id for id in query.gold if id not in known]
            if missing:
                raise BadRecord(f"{where}: field gold names document {missing[0]!r}, which is not in the corpus")
            if query.source_doc is not None and query.source_doc not in known:
                raise BadRecord(
                    f"{where}: field source_doc names document {query.source_doc!r}, which is not in the corpus"
                )


def by_number(id: str) -> tuple[tuple[int, str], ...]:
    """Sort key that puts 9 before 10."""
    return tuple((int(p), "") if p.isdigit() else (0, p) for p in re.split(r"(\d+)", id) if p)


def _add_twins(documents: list[Document], queries: dict[str, list[Query]]) -> tuple[dict[str, list[Query]], int]:
    """Documents of identical text stay apart, and a query for one is a query for all of them."""
    twins = {}
    for group in identical([body(d) for d in documents]):
        ids = [documents[i].id for i in group]
        twins.update(dict.fromkeys(ids, ids))
    changed = 0
    extended: dict[str, list[Query]] = {}
    for split, part in queries.items():
        extended[split] = [_with_twins(query, twins) for query in part]
        changed += sum(a != b for a, b in zip(part, extended[split], strict=True))
    return extended, changed


def _with_twins(query: Query, twins: dict[str, list[str]]) -> Query:
    grades = dict(zip(query.gold, query.grades or (1,) * len(query.gold), strict=True))
    for id in query.gold:
        for twin in twins.get(id, ()):
            grades.setdefault(twin, grades[id])
    if len(grades) == len(query.gold):
        return query
    return replace(query, gold=tuple(grades), grades=tuple(grades.values()) if query.grades else None)


def _limit(
    documents: list[Document], queries: dict[str, list[Query]], config: DataConfig
) -> tuple[list[Document], dict[str, list[Query]], int]:
    if config.max_documents is None or config.max_documents >= len(documents):
        return documents, queries, 0
    ranked = documents
    if config.keep == "relevant":
        relevant = {id for part in queries.values() for query in part for id in query.gold}
        ranked = sorted(documents, key=lambda d: d.id not in relevant)
    kept = {d.id for d in ranked[: config.max_documents]}
    limited = {split: restricted(part, kept) for split, part in queries.items()}
    lost = sum(map(len, queries.values())) - sum(map(len, limited.values()))
    return [d for d in documents if d.id in kept], limited, lost


def restricted(queries: Iterable[Query], kept: AbstractSet[str]) -> list[Query]:
    """Queries with those of their relevant documents that are in ``kept``; those without any are left out."""
    kept_queries = []
    for query in queries:
        pairs = [(id, i) for i, id in enumerate(query.gold) if id in kept]
        if pairs:
            grades = tuple(query.grades[i] for _, i in pairs) if query.grades else None
            kept_queries.append(replace(query, gold=tuple(id for id, _ in pairs), grades=grades))
    return kept_queries


def _duplicate_facts(
    documents: list[Document], queries: dict[str, list[Query]], config: DataConfig
) -> dict[str, float | str]:
    """How many documents say nearly the same as another, and how many queries that makes ambiguous.

    Nothing depends on it, so large corpora go without (``count_duplicates_up_to``), and the notes say so.
    Titles are not compared: a function may do what another does under another name. A query is ambiguous
    if a near-duplicate of one of its documents is not itself relevant to it.
    """
    near, ambiguous = "documents with a near-duplicate", "queries a near-duplicate makes ambiguous"
    if len(documents) > config.count_duplicates_up_to:
        why = f"not counted: more documents than data.count_duplicates_up_to={config.count_duplicates_up_to}"
        return {near: why, ambiguous: why}
    others: dict[str, set[str]] = {}
    for i, j in near_pairs([d.text for d in documents], config.near_duplicate, SETS[config.name].words):
        others.setdefault(documents[i].id, set()).add(documents[j].id)
        others.setdefault(documents[j].id, set()).add(documents[i].id)
    flat = [query for part in queries.values() for query in part]
    unclear = sum(any(others.get(id, set()) - set(query.gold) for id in query.gold) for query in flat)
    return {near: len(others), ambiguous: unclear}


def _ask_for_titles(
    documents: list[Document], queries: dict[str, list[Query]], config: DataConfig
) -> tuple[list[Document], dict[str, list[Query]]]:
    """Documents with a title and a text lose the title, which becomes a query.

    Titles become ``dev`` (``dev_share``) and ``test``, or all ``test`` if dev is made of windows; the set's own
    test queries become the split ``given``, its others stay or become ``train``.
    """
    asking = [Query(f"{d.id}#title", d.title, (d.id,)) for d in documents if d.title.strip() and d.text.strip()]
    titled = {query.gold[0] for query in asking}
    stripped = [replace(d, title="") if d.id in titled else d for d in documents]
    train = [*queries.get("train", []), *queries.get("dev", []), *queries.get(UNSPLIT, [])]
    shares = {} if config.dev_windows else {"dev": config.dev_share}
    titles = divide(asking, shares, "test", by_document=False, threshold=config.near_duplicate, seed=config.seed)
    divided = {"train": train, **titles, "given": queries.get("test", [])}
    return stripped, {split: part for split, part in divided.items() if part}


def _divide(documents: list[Document], queries: dict[str, list[Query]], config: DataConfig) -> dict[str, list[Query]]:
    """Give the queries the splits they lack."""
    by_document = config.split == "by_document"
    if by_document:
        queries = {UNSPLIT: [query for part in queries.values() for query in part]}
    options: dict[str, Any] = {
        "by_document": by_document,
        "threshold": config.near_duplicate,
        "seed": config.seed,
    }
    if UNSPLIT in queries:
        shares = {"test": config.test_share, "dev": config.dev_share}
        rest = {split: part for split, part in queries.items() if split != UNSPLIT}
        queries = {**divide(queries[UNSPLIT], shares, "train", **options), **rest}
    if config.dev_windows:
        queries = {**queries, "dev": hold_out_windows(documents, config.dev_windows, config.seed)}
    elif not queries.get("dev") and queries.get("train"):
        queries = {**queries, **divide(queries["train"], {"dev": config.dev_share}, "train", **options)}
    elif not queries.get("dev"):
        queries = {**queries, "dev": hold_out_windows(documents, DEFAULT_DEV_WINDOWS, config.seed)}
    order = ("train", "dev", "test", "given")
    return {split: queries.get(split, []) for split in order if split != "given" or queries.get(split)}
