"""Does the query already contain the docid? Then generating it is copying, not retrieval."""

from __future__ import annotations

from collections.abc import Sequence

from mobula.data.records import Query
from mobula.errors import DataError
from mobula.retrieval.docids import text
from mobula.retrieval.docids.config import TEXT
from mobula.retrieval.docids.table import DocidTable


class DocidLeak(DataError):
    """Queries that hold the text of the docid they are meant to find."""


def docid_leak(queries: Sequence[Query], table: DocidTable) -> float:
    """Share of queries whose text contains the docid string of one of their gold documents.

    Compared on lower-case alphanumerics; for ``text.keywords`` every keyword must occur. 0 for families whose
    docids are not text. Gold documents outside the table are passed over.
    """
    if table.space.family not in TEXT or not queries:
        return 0.0
    rows = sorted({table.rows[g] for q in queries for g in q.gold if g in table.rows})
    tokens = dict(zip(rows, text.tokens(table.space.arrays, table.codes[rows]), strict=True))
    tokenizer = table.space.require_tokenizer()
    if table.space.family == "text.keywords":
        parts = {row: tokenizer.decode([[t] for t in tokens[row]]) for row in rows}
    else:
        parts = {row: tokenizer.decode([tokens[row]]) for row in rows}
    leaks = sum(
        any(_contains(query.text, parts[table.rows[g]]) for g in query.gold if g in table.rows) for query in queries
    )
    return leaks / len(queries)


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


def _contains(query: str, parts: Sequence[str]) -> bool:
    own = f" {_normal(query)} "
    wanted = [normal for normal in map(_normal, parts) if normal]
    return bool(wanted) and all(f" {w} " in own for w in wanted)


def _normal(string: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in string.lower()).split())
