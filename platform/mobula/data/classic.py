"""Public test collections: SciFact, Vaswani (NPL), Cranfield, CACM and a Natural Questions sample."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobula.data.config import DataConfig
from mobula.data.duplicates import normalise
from mobula.data.records import Document, Query
from mobula.data.sources import UNSPLIT, Collection, blocks, judged_query, read_qrels, read_text, require_folder
from mobula.errors import BadRecord, DataError

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
LONGEST_TITLE = 25  # words; what two spaces set apart later on is a sentence
_LITERAL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_PASSAGE = re.compile(r"\[\d+\] Title: ([^\n]*?) Text: ?(.*?)(?=\n\[\d+\] Title: |\nQuestion: )", re.DOTALL)
_QUESTION = re.compile(r'Please answer the question: "(.*?)" using provided passages', re.DOTALL)


def scifact(config: DataConfig) -> Collection:
    """SciFact (Wadden et al. 2020) as BEIR uses it: 5,183 abstracts; a claim's gold are the abstracts it cites.

    The 809 training claims are ``train``, the 300 validation claims ``test``; the published test claims have no
    labels and are left out.
    """
    folder, source = require_folder("scifact", config.path, "scifact.zip", subfolder="scifact")
    try:
        archive = zipfile.ZipFile(folder / "scifact.zip")
    except zipfile.BadZipFile as error:
        raise DataError(f"{folder / 'scifact.zip'}: not a ZIP archive; fetch it again") from error
    with archive:
        documents = [
            Document(row["doc_id"], row["title"], " ".join(_sentences(row["abstract"])))
            for row in _rows(archive, "corpus_train.csv")
        ]
        train, test = (_claims(_rows(archive, f"claims_{part}.csv")) for part in ("train", "validation"))
    return Collection(source, documents, {"train": train, "test": test})


def _rows(archive: zipfile.ZipFile, name: str) -> Iterator[dict[str, str]]:
    with archive.open(name) as stream:
        yield from csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8"))


def _sentences(printed: str) -> list[str]:
    """The strings of a printed array. They are not separated by commas, so evaluating it would join them."""
    return [ast.literal_eval(literal).strip() for literal in _LITERAL.findall(printed)]


def _claims(rows: Iterator[dict[str, str]]) -> list[Query]:
    """One query per claim; a claim has a row for every piece of its evidence."""
    claims = {}
    for row in rows:
        cited = tuple(dict.fromkeys(row["cited_doc_ids"].strip("[]").replace(",", " ").split()))
        claims[row["id"]] = Query(row["id"], row["claim"], cited)
    return list(claims.values())


def vaswani(config: DataConfig) -> Collection:
    """Vaswani, also called NPL: 11,429 short abstracts, 93 queries, all ``test``.

    Where a document's first words are set apart by two spaces they are its title.
    """
    folder, source = require_folder("vaswani", config.path, "doc-text.trec", subfolder="vaswani_npl")
    documents = []
    for block in blocks(read_text(folder / "doc-text.trec"), "doc"):
        title, text = _set_apart(re.sub(r"<docno>.*?</docno>", "", block, flags=re.I).strip())
        documents.append(Document(_tag(block, "docno"), title, text))
    topics = blocks(read_text(folder / "query-text.trec"), "top")
    texts = {_tag(topic, "num"): _tag(topic, "title").lower() for topic in topics}
    return Collection(source, documents, {"test": _judged(texts, folder / "qrels")})


def _set_apart(text: str) -> tuple[str, str]:
    """Title and text on one line each; no title where no two spaces follow it, or only after too many words."""
    title, _, rest = text.partition("  ")
    if not rest.strip() or len(title.split()) > LONGEST_TITLE:
        return "", _one_line(text)
    return _one_line(title), _one_line(rest)


def cranfield(config: DataConfig) -> Collection:
    """Cranfield: 1,400 abstracts, 225 queries, all ``test``.

    The numbers in the query file run to 365 with gaps while the judgements number the queries 1..225, so the
    two are joined by position. The text of a document repeats its title, which is cut off.
    """
    folder, source = require_folder("cranfield", config.path, "cran.all.1400.xml", subfolder="cranfield")
    documents = []
    for block in blocks(read_text(folder / "cran.all.1400.xml"), "doc"):
        title, text = _tag(block, "title"), _tag(block, "text")
        documents.append(Document(_tag(block, "docno"), title, text.removeprefix(title).strip()))
    topics = blocks(read_text(folder / "cran.qry.xml"), "top")
    texts = {str(position): _tag(topic, "title") for position, topic in enumerate(topics, 1)}
    return Collection(source, documents, {"test": _judged(texts, folder / "cranqrel.trec.txt")})


def cacm(config: DataConfig) -> Collection:
    """CACM: 3,204 dated titles, 1,587 of them with an abstract; the 52 judged queries are ``test``."""
    folder, source = require_folder("cacm", config.path, "cacm.all", subfolder="cacm")
    documents = []
    for number, fields in _smart(read_text(folder / "cacm.all")):
        date = _month(fields.get("B", ""))
        documents.append(Document(f"CACM-{number}", fields.get("T", ""), fields.get("W", ""), date))
    texts = {str(number): fields.get("W", "") for number, fields in _smart(read_text(folder / "query.text"))}
    return Collection(source, documents, {"test": _judged(texts, folder / "qrels.cacm.txt")})


def nq(config: DataConfig) -> Collection:
    """1,000 Natural Questions with five retrieved Wikipedia passages each, pooled into one corpus.

    A question's gold are its passages whose title and text hold its normalised answer (at least 3 characters,
    whole words); questions without such a passage are dropped.
    """
    folder, source = require_folder("nq", config.path, "nq_generator_training.json", subfolder="nq")
    path = folder / "nq_generator_training.json"
    try:
        records = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    ids: dict[tuple[str, str], str] = {}
    queries: list[Query] = []
    for number, record in enumerate(records):
        question = _QUESTION.search(record["prompt"])
        if question is None:
            raise BadRecord(f"{path}, record {number}: field prompt holds no question")
        passages = [(_unquote(title), _one_line(_unquote(text))) for title, text in _PASSAGE.findall(record["prompt"])]
        for passage in passages:
            ids.setdefault(passage, str(len(ids)))
        gold = tuple(dict.fromkeys(ids[p] for p in passages if _holds(" ".join(p), record["response"])))
        if gold:
            queries.append(Query(record["query_id"], question[1], gold))
    documents = [Document(id, title, text) for (title, text), id in ids.items()]
    notes: dict[str, float | str] = {"questions without an answering passage": len(records) - len(queries)}
    return Collection(source, documents, {UNSPLIT: queries}, notes)


def _unquote(field: str) -> str:
    """A field of a tab-separated file: quotes around it go, doubled ones inside become single."""
    field = field.strip()
    quoted = len(field) > 1 and field[0] == field[-1] == '"'
    return (field[1:-1] if quoted else field).replace('""', '"')


def _holds(passage: str, answer: str) -> bool:
    wanted = normalise(answer)
    return len(wanted) >= 3 and f" {wanted} " in f" {normalise(passage)} "


def _tag(block: str, tag: str) -> str:
    match = re.search(rf"<{tag}>(.*?)</{tag}>", block, flags=re.DOTALL | re.IGNORECASE)
    return _one_line(match[1]) if match else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _smart(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(number, field letter -> text) for each record of a file in SMART format (``.I 7``, ``.T``, ``.W``)."""
    for record in re.split(r"^\.I ", text, flags=re.MULTILINE)[1:]:
        number, _, body = record.partition("\n")
        parts = re.split(r"^\.([A-Z])[ \t]*$", body, flags=re.MULTILINE)
        yield int(number), {letter: _one_line(value) for letter, value in zip(parts[1::2], parts[2::2], strict=True)}


def _month(issue: str) -> str | None:
    """ISO date of the first day of the month named in ``CACM December, 1958``."""
    match = re.search(r"([A-Za-z]{3})[a-z]*,?\s*(19\d\d)", issue)
    if match is None or match[1].lower() not in MONTHS:
        return None
    return f"{match[2]}-{MONTHS.index(match[1].lower()) + 1:02d}-01"


def _judged(texts: dict[str, str], qrels: Path) -> list[Query]:
    judged: dict[str, Any] = read_qrels(qrels)
    queries = (judged_query(id, text, judged.get(id, {})) for id, text in texts.items())
    return [query for query in queries if query is not None]
