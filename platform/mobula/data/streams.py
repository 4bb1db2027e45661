"""Dated collections for corpora that grow: PEPs and EIPs, whose sentences cite one another, and PyPA advisories.

Of a series of proposals, a *citing sentence* names exactly one other document. Without its references it is a query
for the cited document, and it is taken out of the document it stands in, which is then neutral to the query.
"""

from __future__ import annotations

import itertools
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mobula.data.config import DataConfig
from mobula.data.duplicates import normalise, split_words
from mobula.data.records import Document, Query
from mobula.data.sources import UNSPLIT, Collection, require_folder
from mobula.errors import BadRecord, DataError

PEPS = "python+peps.peps.tar.gz"
EIPS = "ethereum+EIPs.EIPS.tar.gz"
PYSEC = "pypa+advisory-database.vulns.tar.gz"
# Words of a query: shorter sentences say too little, longer ones are lists or tables.
WORDS = range(8, 61)
# A query of fewer words may stand in a document by chance.
COPIED_WORDS = 8

# A reference in a text under way from markup to plain text: "\x00484\x00".
_MARK = re.compile("\x00(\\d+)\x00")
_REPEATED = re.compile("(\x00\\d+\x00)(?:[\\s(\\[]*\\1)+")
_SENTENCE = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][)\"'”*]))(?<!e\.g\.)(?<!i\.e\.)(?<!cf\.)(?<!vs\.)\s+(?=[A-Z\"'`:(*\[\x00])"
)
_ITEM = re.compile(r"^[ ]*(?:[*+-]|\(?(?:\d+|[A-Za-z]|#)[.)])[ ]", re.MULTILINE)
_ADORNMENT = re.compile(r"\n[ ]*([=\-`:'\"~^_*+#<>.])\1{2,}[ ]*$", re.MULTILINE)
_HOLLOW = re.compile(r"[(\[][\s,;]*[)\]]")
_GENITIVE = re.compile(r"(?:^|(?<=\s))['’]s\b")
_LOOSE = re.compile(r"\s+(?=[,.;:!?)\]]+(?:\s|$))")
_HASHES = re.compile(r"\s*#+[ ]")
_DRAWN = re.compile(r"^\s*(?:>>>|\+[-=]{3}|={3,}[ ]+=|\|)", re.MULTILINE)
_NO_PROSE = re.compile(r"(?:references|footnotes|copyright)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Passage:
    """A run of sentences without a blank line between them; what is not prose is one piece and never cites."""

    sentences: tuple[str, ...]
    prose: bool


@dataclass(frozen=True)
class Proposal:
    """A numbered document of a series; references in its passages are marks."""

    document: Document
    number: int
    passages: tuple[Passage, ...]


def peps(config: DataConfig) -> Collection:
    """Python Enhancement Proposals: 736 documents dated by ``Created``; queries are their citing sentences."""
    folder, source = require_folder("peps", config.path, PEPS, subfolder="peps")
    proposals = [_pep(name, text) for name, text in _members(folder / PEPS, ".rst")]
    return _citing(proposals, "PEP", source, {})


def eips(config: DataConfig) -> Collection:
    """Ethereum Improvement Proposals: 584 documents dated by ``created``; queries are their citing sentences.

    The repository also holds undated stubs, which say where a proposal was moved to; they are left out.
    """
    folder, source = require_folder("eips", config.path, EIPS, subfolder="eips")
    entries = [_eip(name, text) for name, text in _members(folder / EIPS, ".md")]
    proposals = [proposal for proposal in entries if proposal is not None]
    return _citing(proposals, "EIP", source, {"documents without a date": len(entries) - len(proposals)})


def pysec(config: DataConfig) -> Collection:
    """PyPA advisories dated by ``published``; those of equal text, filed for several packages, are one document.

    Known-item queries: the first sentence asks for the rest. A first sentence that several advisories share, or whose
    rest several share, identifies nothing: it stays in its document and asks for nothing.
    """
    folder, source = require_folder("pysec", config.path, PYSEC, subfolder="pysec")
    advisories: dict[str, list[dict[str, Any]]] = defaultdict(list)
    undated = 0
    for name, text in _members(folder / PYSEC, ".yaml"):
        record = _advisory(name, text)
        if record.get("published"):
            advisories[normalise(record["details"])].append(record)
        else:
            undated += 1
    documents = [_merged(records) for records in advisories.values()]
    merged = sum(map(len, advisories.values())) - len(documents)
    documents, queries, dropped = _first_sentences(documents)
    notes: dict[str, float | str] = {
        "documents without a date": undated,
        "documents merged, their texts being equal": merged,
        **dropped,
    }
    return Collection(source, documents, {UNSPLIT: queries}, notes)


def _members(path: Path, suffix: str) -> Iterator[tuple[str, str]]:
    """(file name, text) of the archive's regular files of a suffix, by name. Nothing is written to disk.

    Raises:
        DataError: if the archive is damaged or a file in it is not UTF-8 text.
    """
    texts = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                stream = archive.extractfile(member) if member.isfile() and name.endswith(suffix) else None
                if stream is not None:
                    texts[name] = stream.read().decode("utf-8")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: not a complete tar.gz archive ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {name} is not UTF-8 text (byte {error.start})") from error
    yield from sorted(texts.items())


# Series of proposals


def _citing(proposals: Sequence[Proposal], series: str, source: str, notes: dict[str, float | str]) -> Collection:
    """Documents without their citing sentences, and the queries made of those.

    No query's text stands in any document, and no query holds the number it asks for.
    """
    ids = {proposal.number: proposal.document.id for proposal in proposals}
    queries: list[Query] = []
    documents: list[Document] = []
    for proposal in proposals:
        cited = _queries(proposal, ids)
        queries.extend(cited)
        documents.append(_without(proposal, {normalise(query.text) for query in cited}, series))
    queries, repeated = _unambiguous(queries)
    unseen = _absent(queries, documents, series)
    dropped = {
        "queries dropped, the same sentence citing several documents": repeated,
        "queries dropped, their sentence standing in another document": len(queries) - len(unseen),
    }
    return Collection(source, documents, {UNSPLIT: unseen}, {**notes, **dropped})


def _queries(proposal: Proposal, ids: dict[int, str]) -> list[Query]:
    """The citing sentences of a proposal, each once, without their references."""
    queries: dict[tuple[str, str], Query] = {}
    source = proposal.document.id
    for sentence in (s for passage in proposal.passages if passage.prose for s in passage.sentences):
        cited = {int(number) for number in _MARK.findall(sentence)} - {proposal.number}
        number = min(cited, default=0)
        if len(cited) != 1 or number not in ids or len(sentence.split()) not in WORDS:
            continue
        text = _bare(sentence)
        if not _names(text, number):
            query = Query(f"{source}#{len(queries) + 1}", text, (ids[number],), source_doc=source)
            queries.setdefault((normalise(text), ids[number]), query)
    return list(queries.values())


def _names(text: str, number: int) -> bool:
    return re.search(rf"(?<!\d)0*{number}(?!\d)", text) is not None


def _bare(sentence: str) -> str:
    """A sentence without its references and what their absence leaves behind (empty brackets, stray spaces)."""
    text = _GENITIVE.sub(" ", _HOLLOW.sub(" ", _MARK.sub(" ", sentence)))
    return _LOOSE.sub("", " ".join(text.split())).lstrip(" ,;:.)-")


def _named(text: str, series: str) -> str:
    """A text with its references in words."""
    return " ".join(_MARK.sub(rf"{series} \1", text).split()) if "\x00" in text else text


def _without(proposal: Proposal, removed: set[str], series: str) -> Document:
    """The document, one line per passage, without the sentences that became queries."""
    lines = []
    for passage in proposal.passages:
        kept = [s for s in passage.sentences if "\x00" not in s or normalise(_bare(s)) not in removed]
        lines.append(_named(" ".join(kept), series))
    return replace(proposal.document, text="\n".join(line for line in lines if line))


def _unambiguous(queries: list[Query]) -> tuple[list[Query], int]:
    """Queries whose text asks for one document only, and how many others there were."""
    golds: dict[str, set[str]] = defaultdict(set)
    for query in queries:
        golds[normalise(query.text)].update(query.gold)
    kept = [query for query in queries if len(golds[normalise(query.text)]) == 1]
    return kept, len(queries) - len(kept)


def _absent(queries: list[Query], documents: Sequence[Document], series: str = "") -> list[Query]:
    """Queries but those of ``COPIED_WORDS`` words or more that a document holds, references read or skipped."""
    openings: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for position, query in enumerate(queries):
        words = split_words(query.text)
        if len(words) >= COPIED_WORDS:
            openings[tuple(words[:COPIED_WORDS])].append(position)
    present: set[int] = set()
    reference = re.compile(rf" {series.lower()} \d+(?= )")
    for document in documents:
        whole = f" {normalise(document.text)} "
        for text in {whole, reference.sub("", whole)} if series else {whole}:
            words = text.split()
            rows = zip(*(words[start:] for start in range(COPIED_WORDS)), strict=False)
            suspects = [i for row in openings.keys() & set(rows) for i in openings[row]]
            present.update(i for i in suspects if f" {normalise(queries[i].text)} " in text)
    return [query for position, query in enumerate(queries) if position not in present]


# PEPs: reStructuredText

_PEP_HEADER = re.compile(r"^([A-Z][\w-]*):[ ]*(.*(?:\n[ \t]+.*)*)", re.MULTILINE)
_PEP_URL = re.compile(r"(?:https?://[^\s<>()\[\]`]*?|\b)pep-?(\d{4})\b[^\s<>()\[\]`]*", re.IGNORECASE)
_PEP_ROLE = re.compile(r":pep:`(?:([^`<]*?)\s*<0*(\d+)(?:#[^>]*)?>|0*(\d+)(?:#[^`]*)?)`", re.IGNORECASE)
_PEP_LIST = re.compile(r"\bPEPs\s+(\d{1,4}(?:(?:,\s*(?:and\s+|or\s+)?|\s+(?:and|or|to|through)\s+)\d{1,4})+)\b")
_PEP_PLAIN = re.compile(r"\bPEPs?[-_\s]*(\d{1,4})(?!\d)", re.IGNORECASE)
_RST_ROLE = re.compile(r":[\w:+-]+:`([^`<]*?)(?:\s*<[^`>]*>)?`")
_RST_LITERAL = re.compile(r"``(.+?)``")
_RST_LINK = re.compile(r"`([^`<]+?)\s*(?:<([^`>]*)>)?`_{0,2}")
_RST_FOOTNOTE = re.compile(r"\[[\w#*-]+\]_(?!\w)")


def _pep(name: str, text: str) -> Proposal:
    head, _, body = text.replace("\r\n", "\n").partition("\n\n")
    fields = {key: " ".join(value.split()) for key, value in _PEP_HEADER.findall(head)}
    missing = [key for key in ("PEP", "Title", "Type", "Created") if not fields.get(key)]
    if missing:
        raise BadRecord(f"{name}: field {missing[0]} is missing from the header")
    try:
        date = datetime.strptime(fields["Created"], "%d-%b-%Y").date().isoformat()
    except ValueError as error:
        raise BadRecord(f"{name}: field Created must read like 28-Feb-2018, found {fields['Created']!r}") from error
    part = "/".join(fields[key] for key in ("Type", "Topic") if fields.get(key))
    document = Document(name.removesuffix(".rst"), fields["Title"], "", date, part)
    return Proposal(document, int(fields["PEP"]), tuple(_passages(_rst_blocks(body), _pep_marks)))


def _rst_blocks(body: str) -> Iterator[tuple[str, bool]]:
    """(block, whether it may be prose) of reStructuredText; a block has no blank line in it."""
    inside: int | None = None
    for block in re.split(r"\n(?:[ ]*\n)+", body.expandtabs()):
        indent = len(block) - len(block.lstrip(" "))
        if inside is not None and indent > inside:
            yield block, False
            continue
        # What is indented below "::" or a directive belongs to it.
        directive = block.lstrip().startswith("..")
        inside = indent if directive or block.rstrip().endswith("::") else None
        yield block, not directive


def _pep_marks(text: str) -> str:
    if "pep" in text.lower():
        text = _PEP_URL.sub(_mark, text)
        text = _PEP_ROLE.sub(lambda m: f"{m[1] or ''} \x00{int(m[2] or m[3])}\x00", text)
        text = _PEP_LIST.sub(lambda m: re.sub(r"\d+", _mark_number, m[1]), text)
        text = _PEP_PLAIN.sub(_mark, text)
    if "`" in text:
        text = _RST_ROLE.sub(r"\1", text)
        text = _RST_LITERAL.sub(r"\1", text)
        text = _RST_LINK.sub(_rst_link, text)
    return _RST_FOOTNOTE.sub(" ", text) if "]_" in text else text


def _rst_link(match: re.Match[str]) -> str:
    """The label of a link, and its target if that is a mark."""
    return f"{match[1]} {''.join(mark[0] for mark in _MARK.finditer(match[2] or ''))}"


# EIPs: Markdown

_EIP_LINK = re.compile(r"\[([^\[\]]*)\](?:\([^()\s]*?\b(?:eip|erc)-0*(\d{1,5})(?:\.md)?[^()]*\)|\[[^\[\]]*\])", re.I)
_EIP_URL = re.compile(r"(?:https?://|\.{0,2}/)[^\s()<>]*?\b(?:eip|erc)-0*(\d{1,5})(?!\d)[^\s()<>,;]*", re.IGNORECASE)
_EIP_LIST = re.compile(r"\b(?:EIP|ERC)s\s+(\d{1,5}(?:(?:,\s*(?:and\s+|or\s+)?|\s+(?:and|or|to)\s+)\d{1,5})+)\b")
_EIP_PLAIN = re.compile(r"\b(?:EIP|ERC)s?[-‑_\s/]*#?0*(\d{1,5})(?!\d)", re.IGNORECASE)
_MD_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()]*\)")


def _eip(name: str, text: str) -> Proposal | None:
    """A proposal, or None for an undated stub."""
    parts = re.split(r"^---[ ]*$", text.replace("\r\n", "\n"), maxsplit=2, flags=re.MULTILINE)
    if len(parts) != 3:
        raise BadRecord(f"{name}: no header between two lines of ---")
    _, head, body = parts
    fields = dict(re.findall(r"^([a-z-]+):[ ]*(.*?)[ ]*$", head, flags=re.MULTILINE))
    if "created" not in fields:
        return None
    missing = [key for key in ("eip", "title", "type") if not fields.get(key)]
    if missing:
        raise BadRecord(f"{name}: field {missing[0]} is missing from the header")
    if re.fullmatch(r"\d{4}-\d\d-\d\d", fields["created"]) is None:
        raise BadRecord(f"{name}: field created must read like 2019-04-13, found {fields['created']!r}")
    title = fields["title"].strip("\"'")
    document = Document(
        name.removesuffix(".md"), title, "", fields["created"], fields.get("category") or fields["type"]
    )
    return Proposal(document, int(fields["eip"]), tuple(_passages(_markdown_blocks(body), _eip_marks)))


def _markdown_blocks(body: str) -> Iterator[tuple[str, bool]]:
    """(block, whether it may be prose) of Markdown; a block has no blank line in it."""
    body = re.sub(r"<!--.*?-->", " ", body, flags=re.DOTALL)
    parts = re.split(r"^[ ]*(?:```|~~~).*$", body.expandtabs(4), flags=re.MULTILINE)
    for position, part in enumerate(parts):
        code = position % 2 == 1
        # A heading stands alone even without a blank line around it.
        part = part if code else re.sub(r"^(#+[ ].*)$", r"\n\1\n", part, flags=re.MULTILINE)
        for block in re.split(r"\n(?:[ ]*\n)+", part):
            aside = block.lstrip().startswith(("|", "<")) or re.match(r"\s*\[[^\]]+\]:", block) is not None
            yield block, not code and not aside


def _eip_marks(text: str) -> str:
    if "eip" in (lower := text.lower()) or "erc" in lower:
        text = _EIP_LINK.sub(lambda m: f"{m[1]} \x00{int(m[2])}\x00" if m[2] else m[1], text)
        text = _EIP_URL.sub(_mark, text)
        text = _EIP_LIST.sub(lambda m: re.sub(r"\d+", _mark_number, m[1]), text)
        text = _EIP_PLAIN.sub(_mark, text)
    return _MD_LINK.sub(r"\1", text).replace("`", "")


# Both markups


def _mark(match: re.Match[str]) -> str:
    return f" \x00{int(match[1])}\x00"


def _mark_number(match: re.Match[str]) -> str:
    return f"\x00{int(match[0])}\x00"


def _passages(blocks: Iterator[tuple[str, bool]], marks: Callable[[str], str]) -> Iterator[Passage]:
    """Blocks as passages: headings and what stands below references are not prose, items of a list stand alone."""
    listed = False
    for block, prose in blocks:
        heading = _heading(block) if prose else None
        if heading is not None:
            listed = _NO_PROSE.match(heading) is not None
            yield Passage((_marked(heading, marks),), False)
        elif prose and not listed and not _drawn(block):
            yield from (Passage(tuple(_SENTENCE.split(_marked(item, marks))), True) for item in _items(block))
        elif block.strip():
            yield Passage((_marked(block, marks),), False)


def _heading(block: str) -> str | None:
    """The text of a heading of either markup, or None."""
    if _HASHES.match(block):
        return block.strip().strip("#").strip()
    if not _ADORNMENT.search(block):
        return None
    lines = [line for line in block.strip("\n").split("\n") if not _ADORNMENT.match(f"\n{line}")]
    return lines[0].strip() if len(lines) == 1 else None


def _drawn(block: str) -> bool:
    """Tables and interpreter dialogues."""
    return _DRAWN.search(block) is not None


def _items(block: str) -> list[str]:
    starts = [match.start() for match in _ITEM.finditer(block)]
    edges = [0, *(start for start in starts if start), len(block)]
    items = (_ITEM.sub("", block[a:b], count=1) for a, b in itertools.pairwise(edges))
    return [item for item in items if item.strip()]


def _marked(text: str, marks: Callable[[str], str]) -> str:
    """One line of plain text with marks; a mark that repeats the one before it goes."""
    marked = marks(" ".join(text.split()))
    return " ".join(_REPEATED.sub(r"\1", marked).split()) if "\x00" in marked else marked.strip()


# Advisories

# Scalars stay text, and no tag is obeyed; the pure Python loader takes ten times as long.
_Loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def _advisory(name: str, text: str) -> dict[str, Any]:
    try:
        record = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise BadRecord(f"{name}: not valid YAML ({' '.join(str(error).split())})") from error
    missing = [key for key in ("id", "details", "affected") if not isinstance(record, dict) or not record.get(key)]
    if missing:
        raise BadRecord(f"{name}: field {missing[0]} is missing")
    if re.match(r"\d{4}-\d\d-\d\d", record.get("published") or "1970-01-01") is None:
        raise BadRecord(f"{name}: field published must begin like 2021-07-30, found {record['published']!r}")
    return record


def _merged(records: list[dict[str, Any]]) -> Document:
    """One document for advisories of equal text: the id and date of the earliest, the packages of all."""
    first = min(records, key=lambda record: (record["published"], record["id"]))
    packages = sorted({entry["package"]["name"] for record in records for entry in record["affected"]})
    known = next((alias for alias in first.get("aliases") or () if alias.startswith("CVE-")), first["id"])
    title = f"{', '.join(packages)}: {known}"
    return Document(first["id"], title, " ".join(first["details"].split()), first["published"][:10], packages[0])


def _first_sentences(documents: Sequence[Document]) -> tuple[list[Document], list[Query], dict[str, float | str]]:
    """Documents without the first sentences that became queries, these queries, and what was dropped."""
    openings = {d.id: _SENTENCE.split(d.text, maxsplit=1) for d in documents}
    seen = Counter(normalise(part) for parts in openings.values() for part in parts)
    asking = [d for d in documents if len(openings[d.id]) == 2 and len(openings[d.id][0].split()) in WORDS]
    telling = {d.id for d in asking if all(seen[normalise(part)] == 1 for part in openings[d.id])}
    kept = [replace(d, text=openings[d.id][1]) if d.id in telling else d for d in documents]
    queries = [Query(f"{d.id}#first", openings[d.id][0], (d.id,)) for d in documents if d.id in telling]
    unseen = _absent(queries, kept)
    dropped: dict[str, float | str] = {
        "documents of one sentence, or whose first is too short or too long": len(documents) - len(asking),
        "first sentences that several documents share, or whose rests do": len(asking) - len(telling),
        "queries dropped, their sentence standing in another document": len(queries) - len(unseen),
    }
    return kept, unseen, dropped
