"""Ranking measures on document ids, and TREC run files.

Ties are broken against the system: a relevant document stands behind every other document of the same score, so
the rank of a query is 1 + #{non-gold d: s(d) >= s(best gold)}. Measures are those of ir-measures
(https://ir-measur.es): Hit@k is its Success@k, MRR@k its RR@k, nDCG@10 has linear gain and log2 discount.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import ir_measures
import numpy as np
from ir_measures import RR, Qrel, ScoredDoc, Success, nDCG

from mobula.artifacts import write_text
from mobula.data.records import Query
from mobula.errors import DataError, MobulaError

_MEASURES = {
    "Hit@1": Success @ 1,
    "Hit@5": Success @ 5,
    "Hit@10": Success @ 10,
    "Hit@100": Success @ 100,
    "MRR@10": RR @ 10,
    "MRR@100": RR @ 100,
    "nDCG@10": nDCG @ 10,
}
MEASURES = tuple(_MEASURES)


class UnequalWidth(MobulaError):
    """A measure that looks deeper than a system had candidates."""


class Scored(Protocol):
    """A retrieved document."""

    @property
    def doc_id(self) -> str: ...
    @property
    def score(self) -> float: ...


def per_query(
    hits: Sequence[Sequence[Scored]],
    queries: Sequence[Query],
    *,
    documents: int,
    measures: Sequence[str] | None = None,
    width: int | None = None,
) -> dict[str, np.ndarray]:
    """Each measure as an array f64[Q] in the order of ``queries``.

    Args:
        hits: a ranked list per query, as a retriever returned it.
        documents: number of documents in the corpus; a shorter list is known to be cut off.
        measures: names out of :data:`MEASURES`; None: all that ``width`` allows.
        width: candidates the system really ranked (a beam of 10 has 10); None: the length of its lists.

    Raises:
        UnequalWidth: if a measure looks deeper than ``width`` or than the lists.
        DataError: if a list names a document twice.
    """
    depth = min((len(ranked) for ranked in hits), default=0)
    width = depth if width is None else min(depth, width)
    if measures is None:
        measures = measures_within(width, documents)
    for measure in measures:
        check_width(measure, width, documents)
    run: list[ScoredDoc] = []
    qrels: list[Qrel] = []
    for position, (ranked, query) in enumerate(zip(hits, queries, strict=True)):
        # Positions serve as query ids: the caller's need not be unique across splits.
        id = str(position)
        grades = query.grades or (1,) * len(query.gold)
        qrels.extend(Qrel(id, doc, grade) for doc, grade in zip(query.gold, grades, strict=True))
        order = pessimistic(ranked, query.gold, documents)
        run.extend(ScoredDoc(id, doc, float(-rank)) for rank, doc in enumerate(order))
    values = {name: np.zeros(len(queries)) for name in measures}
    names = {_MEASURES[name]: name for name in measures}
    for result in ir_measures.iter_calc(list(names), qrels, run):
        values[names[result.measure]][int(result.query_id)] = result.value
    return values


def pessimistic(hits: Sequence[Scored], gold: Sequence[str], documents: int) -> list[str]:
    """Document ids by falling score, relevant documents last among equals.

    If the list is cut off (shorter than ``documents``) inside a group of equal scores, more of that group may lie
    beyond its end, and the group's relevant documents are left out.
    """
    relevant = set(gold)
    scores = {hit.doc_id: hit.score for hit in hits}
    if len(scores) != len(hits):
        raise DataError("a ranked list names a document twice; lists must hold distinct documents")
    order = sorted(scores, key=lambda doc: (-scores[doc], doc in relevant))
    last = [doc for doc in order if scores[doc] == scores[order[-1]]]
    if len(order) < documents and len(last) > 1:
        return [doc for doc in order if doc not in relevant or doc not in last]
    return order


def depth_of(measure: str) -> int:
    """The cut-off of a measure's name."""
    return int(measure.rsplit("@", 1)[1])


def check_width(measure: str, width: int, documents: int) -> None:
    """Refuse a measure that looks deeper than the candidates a system had.

    Raises:
        UnequalWidth: for Hit@100 from a beam of 10, say.
    """
    if width < min(depth_of(measure), documents):
        raise UnequalWidth(f"{measure} needs {depth_of(measure)} candidates per query, but only {width} were ranked")


def measures_within(width: int, documents: int) -> tuple[str, ...]:
    """The measures that a system with ``width`` candidates can be held to."""
    return tuple(name for name in MEASURES if width >= min(depth_of(name), documents))


def width_note(names: tuple[str, str], widths: tuple[int, int]) -> str:
    """What to say beside a comparison of systems that ranked unequally many candidates; empty if equally many."""
    if widths[0] == widths[1]:
        return ""
    return f"unequal candidate width: {names[0]} ranked {widths[0]}, {names[1]} {widths[1]}"


def write_run(path: Path, hits: Sequence[Sequence[Scored]], queries: Sequence[Query], tag: str) -> None:
    """Write a TREC run file: ``query Q0 document rank score tag``.

    Raises:
        DataError: if an id holds white space, which the format cannot carry.
    """
    lines = []
    for ranked, query in zip(hits, queries, strict=True):
        for rank, hit in enumerate(ranked, 1):
            if len(query.id.split()) != 1 or len(hit.doc_id.split()) != 1:
                raise DataError(f"{path}: ids with white space ({query.id!r}, {hit.doc_id!r}) do not fit a run file")
            lines.append(f"{query.id} Q0 {hit.doc_id} {rank} {hit.score!r} {tag}\n")
    write_text(path, "".join(lines))


def read_run(path: Path) -> dict[str, list[tuple[str, float]]]:
    """(document id, score) by query id, in the order of their ranks.

    Raises:
        DataError: for a line that is not of the format.
    """
    run: dict[str, list[tuple[int, str, float]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        parts = line.split()
        try:
            query, _, document, rank, score, _ = parts
            run.setdefault(query, []).append((int(rank), document, float(score)))
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: expected `query Q0 document rank score tag`, found {line!r}"
            ) from error
    return {query: [(document, score) for _, document, score in sorted(entries)] for query, entries in run.items()}


def subset(values: Mapping[str, np.ndarray], chosen: Iterable[bool]) -> dict[str, np.ndarray]:
    """The measures of the chosen queries (a stratum), one flag per query."""
    mask = np.fromiter(chosen, dtype=bool)
    return {name: array[..., mask] for name, array in values.items()}
