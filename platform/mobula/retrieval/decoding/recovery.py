"""Does decoding recover from an early error? (spec 8)

The first code that is committed is forced to be wrong: the most probable code of that level that a document
has but no relevant document does. A code that cannot be revised leaves the exact docid out of reach; what is
measured is how often the final docid, or the top 10, is right all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.decoding.corpus import Corpus
from mobula.retrieval.search import BadSearch, SearchOptions

FORCIBLE = ("match", "match_rerank", "best_of_n", "greedy")
TOP = 10


@dataclass(frozen=True)
class Recovery:
    """Per query, bool[Q]: whether the final docid is a relevant document's, whether one is in the top 10."""

    final: np.ndarray
    top: np.ndarray


def recovery(
    decoder: Decoder | ArDecoder,
    query: dict[str, Tensor],
    options: SearchOptions,
    gold: Sequence[set[str]],
) -> Recovery:
    """Decode Q queries with an error forced at the first commit. ``gold`` names their relevant documents.

    Raises:
        BadSearch: for a decoder that does not commit codes one after the other, or a query without any
            relevant document in the corpus, for which no code is wrong.
    """
    forcible = options.decoder in FORCIBLE or (options.decoder == "beam" and isinstance(decoder, ArDecoder))
    if not forcible:
        raise BadSearch(f"decoder={options.decoder}: an error can be forced with {', '.join(FORCIBLE)} or an AR beam")
    forbidden = [_right_codes(decoder.corpus, relevant) for relevant in gold]
    results = decoder.search(query, [replace(options, k=TOP)] * len(gold), gold, forbidden=forbidden)
    hits = [{hit.doc_id for hit in one.hits} for one in results]
    return Recovery(
        np.array([bool(one.raw_exact) for one in results]),
        np.array([not ids.isdisjoint(relevant) for ids, relevant in zip(hits, gold, strict=True)]),
    )


def _right_codes(corpus: Corpus, relevant: set[str]) -> np.ndarray:
    """Codes bool[L, K] that some relevant document has."""
    known = [corpus.table.rows[doc_id] for doc_id in relevant if doc_id in corpus.table.rows]
    rows = corpus.positions(np.array(known, np.int64))
    if not known:
        raise BadSearch(f"none of the relevant documents {sorted(relevant)[:3]} is in the corpus; drop the query")
    right = np.zeros((corpus.levels, corpus.table.width), bool)
    right[np.arange(corpus.levels)[:, None], corpus.columns[:, rows]] = True
    return right
