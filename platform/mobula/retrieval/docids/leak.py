"""Does the query already contain the docid? Then generating it is copying, not retrieval."""

from __future__ import annotations

from collections.abc import Sequence

from mobula.data.records import Query
from mobula.errors import DataError
from mobula.retrieval.docids import text
from mobula.retrieval.docids.families import Text
from mobula.retrieval.docids.table import DocidTable


class DocidLeak(DataError):
    """Queries that hold the text of the docid they are meant to find."""


def docid_leak(queries: Sequence[Query], table: DocidTable) -> float:
    """Share of queries that contain the docid of one of their gold documents; 0 if docids are not text.

    Titles and leads are compared as strings of lower-case alphanumerics (a docid may end within a word),
    keywords as sets of tokens. Gold documents outside the table are passed over.
    """
    family = table.space.kind
    if not isinstance(family, Text) or not queries:
        return 0.0
    rows = sorted({table.rows[g] for q in queries for g in q.gold if g in table.rows})
    tokens = dict(zip(rows, text.tokens(table.vocabulary, table.codes[rows]), strict=True))
    golds = [[tokens[table.rows[g]] for g in q.gold if g in table.rows] for q in queries]
    tokenizer = table.space.require_tokenizer()
    if family.keywords:
        own = map(set, tokenizer.encode([q.text for q in queries]))
        leaks = [any(row and set(row) <= has for row in gold) for has, gold in zip(own, golds, strict=True)]
    else:
        leaks = [
            any(_contains(query.text, tokenizer.decode(row)) for row in gold)
            for query, gold in zip(queries, golds, strict=True)
        ]
    return sum(leaks) / len(queries)


def require_no_leak(queries: Sequence[Query], table: DocidTable, limit: float) -> float:
    """The share of :func:`docid_leak`, if it is at most ``limit``.

    Raises:
        DocidLeak: if it is more.
    """
    share = docid_leak(queries, table)
    if share > limit:
        raise DocidLeak(
            f"{share:.1%} of the queries contain the docid of their gold document (docid.family="
            f"{table.space.family}, at most {limit:.1%}); use another docid family or other queries"
        )
    return share


def _contains(query: str, docid: str) -> bool:
    wanted = _normal(docid)
    return bool(wanted) and f" {wanted}" in f" {_normal(query)}"


def _normal(string: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in string.lower()).split())
