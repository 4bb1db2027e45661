"""How a request of the `retriever` application is carried out: by which retriever, decoder and budget."""

from __future__ import annotations

from typing import Any

from mobula.config import nearest
from mobula.retrieval.search import Searchable, SearchOptions
from mobula.serving import calibration
from mobula.serving.calibration import Calibration
from mobula.serving.errors import RequestRefused
from serve_apps.retriever.schema import Budget, SearchRequest

# Decoders whose cost grows with the steps; the others make a number of calls of their own.
STEPWISE = ("match", "match_rerank", "best_of_n")


def plan(
    request: SearchRequest, searchable: Searchable, measured: Calibration
) -> tuple[str, SearchOptions, dict[str, Any]]:
    """Retriever, options and applied budget of a request; ``measured`` are the latencies of the default retriever.

    Raises:
        RequestRefused: as :func:`chosen`, and 422 for max_ms where nothing was measured.
        BadSearch: if the options do not fit the model.
    """
    retriever, decoder = chosen(request, searchable)
    steps, over_budget = request.steps, False
    if request.max_ms is not None:
        if retriever != searchable.default or decoder not in measured.p95_ms:
            raise RequestRefused(
                422, "bad_search", f"max_ms: no latency of {decoder} with {retriever} was measured; give steps instead"
            )
        fitting = measured.steps_within(decoder, request.max_ms)
        if fitting is None:
            over_budget = True
            decoder = "one_pass" if "one_pass" in searchable.retrievers[retriever].decoders else decoder
        else:
            steps = fitting[0]
    options = SearchOptions(
        k=request.k,
        # A retriever without decoders does not read this.
        decoder=decoder or SearchOptions.decoder,
        steps=steps,
        threshold=request.threshold,
        order=request.order,
        remask=request.remask,
        constraint=request.constraint,
        beam=request.beam,
        seed=request.seed,
    )
    options.check(searchable.levels)
    applied = options.budget(searchable.levels) if request.threshold is None and decoder in STEPWISE else None
    budget = Budget(steps=applied, threshold=request.threshold, max_ms=request.max_ms, over_budget=over_budget)
    return retriever, options, budget.model_dump()


def chosen(request: SearchRequest, searchable: Searchable) -> tuple[str, str]:
    """Retriever and decoder of a request; the decoder is empty where the retriever has none.

    Raises:
        RequestRefused: 422 for an unknown retriever, or a decoder that it does not have.
    """
    retriever = request.retriever or searchable.default
    if retriever not in searchable.retrievers:
        names = list(searchable.retrievers)
        raise RequestRefused(422, "bad_search", f"unknown retriever {retriever!r}{nearest(retriever, names)}")
    decoders = searchable.retrievers[retriever].decoders
    if request.decoder is None:
        return retriever, decoders[0] if decoders else ""
    if request.decoder not in decoders:
        has = ", ".join(decoders) or "no decoders"
        raise RequestRefused(422, "bad_search", f"decoder={request.decoder}: {retriever} has {has}")
    return retriever, request.decoder


def calibrate(searchable: Searchable, cap_s: float) -> Calibration:
    """Measure the default retriever on texts of its own corpus, at batch size 1, for at most ``cap_s`` seconds."""
    if not cap_s:
        return Calibration({})
    retriever = searchable.retrievers[searchable.default]
    budgets = _powers(searchable.levels)
    arms = [(d, s) for d in retriever.decoders for s in (budgets if d in STEPWISE else [None])]
    decoder = (*retriever.decoders, SearchOptions.decoder)[0]
    (seeds,) = retriever.search(["what"], [SearchOptions(k=calibration.REPEATS, decoder=decoder)])
    documents = [searchable.document(hit.doc_id) for hit in seeds.hits]
    texts = [" ".join((d["title"] or d["text"][:240]).split()[:16]) for d in documents]
    queries = [text for text in texts if text] or ["what"]

    def run(decoder: str, steps: int | None, repeat: int) -> None:
        retriever.search([queries[repeat % len(queries)]], [SearchOptions(decoder=decoder, steps=steps)])

    return calibration.measure(arms, run, cap_s)


def _powers(levels: int) -> list[int]:
    """1, 2, 4, ... and the code length itself."""
    return sorted({2**i for i in range(levels.bit_length()) if 2**i <= levels} | {levels})
