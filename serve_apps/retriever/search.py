"""How the `retriever` application searches: requests are planned, batched, timed and answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from mobula.cancellation import raise_if_cancelled
from mobula.retrieval.results import BATCH
from mobula.retrieval.search import SearchOptions, SearchResult
from mobula.serving.app import time_limit, to_json
from mobula.serving.batching import Batcher
from mobula.serving.errors import RequestRefused, dumps
from mobula.serving.mcp_server import ServedTool
from mobula.serving.metrics import Metrics
from mobula.serving.streaming import stream
from serve_apps.retriever.budget import plan
from serve_apps.retriever.corpus import Corpus, Snapshot, finite
from serve_apps.retriever.schema import RetrieverArgs, RetrieveRequest, SearchRequest, Wanted


@dataclass
class State:
    """What the routes share; ``corpus`` is replaced as a whole when another artifact is swapped in."""

    corpus: Corpus


class Searching:
    """Answers search requests on the corpus of ``state``."""

    def __init__(self, state: State, args: RetrieverArgs, metrics: Metrics) -> None:
        self.state, self.args, self.metrics = state, args, metrics
        self.batcher = Batcher(_compute, args.max_batch_size, metrics.batch)

    async def search(self, request: SearchRequest) -> Response:
        """Hits as JSON."""
        start = time.perf_counter()
        # If another artifact is swapped in meanwhile, this request still gets all of its answer from this one.
        corpus = self.state.corpus
        retriever, options, budget = plan(request, corpus.searchable, corpus.calibration)
        group = (corpus, retriever, options.decoder, options.steps, options.threshold, options.remask)
        async with time_limit(self.args.time_limit_s):
            await corpus.reach(request.version)
            result, snapshot = await self.batcher.submit(group, (request.query, options))
        ms = 1000 * (time.perf_counter() - start)
        self.metrics.search(retriever, result.decoder, ms)
        return to_json(_found(result, snapshot, retriever, budget, ms))

    async def retrieve(self, request: RetrieveRequest) -> list[list[dict[str, Any]]]:
        """The hits of several queries, of one version of the corpus."""
        start, corpus = time.perf_counter(), self.state.corpus
        single = SearchRequest(query=request.queries[0], k=request.topk)
        retriever, options, _ = plan(single, corpus.searchable, corpus.calibration)
        # A group by itself: other searches take their turns between two of these, and none waits for more than one.
        group = (_Together(), corpus, retriever)
        async with time_limit(self.args.time_limit_s):
            results, snapshot = await self.batcher.submit(group, (request.queries, options))
        self.metrics.search(retriever, results[0].decoder, 1000 * (time.perf_counter() - start))
        return [_passages(result, snapshot, request.return_scores) for result in results]

    def tool(self) -> ServedTool:
        """Search for programs: passages as JSON."""

        async def search(given: Wanted) -> str:
            request = RetrieveRequest(queries=[given.query], topk=given.k, return_scores=True)
            return dumps((await self.retrieve(request))[0]).decode()

        return ServedTool("search", "The passages nearest to a query, best first, with scores.", Wanted, search)

    async def trace(self, request: SearchRequest) -> Response:
        """Denoising steps and hits as events."""
        corpus = self.state.corpus
        retriever, options, budget = plan(request, corpus.searchable, corpus.calibration)
        if retriever != corpus.searchable.default:
            raise RequestRefused(422, "bad_search", f"only {corpus.searchable.default} has denoising steps to trace")
        async with time_limit(self.args.time_limit_s):
            await corpus.reach(request.version)
        corpus.follow()
        return stream(self._steps(request.query, options, corpus.snapshot, budget))

    async def _steps(
        self, query: str, options: SearchOptions, snapshot: Snapshot, budget: dict[str, Any]
    ) -> AsyncIterator[tuple[str, Any]]:
        start = time.perf_counter()
        deadline = time.monotonic() + self.args.time_limit_s
        steps = self.batcher.iterate(lambda: snapshot.searchable.trace(query, options))
        try:
            while True:
                async with asyncio.timeout(deadline - time.monotonic()):
                    item = await anext(steps)
                if isinstance(item, SearchResult):
                    ms = 1000 * (time.perf_counter() - start)
                    retriever = snapshot.searchable.default
                    self.metrics.search(retriever, options.decoder, ms)
                    yield "result", _found(item, snapshot, retriever, budget, ms)
                    return
                yield "step", vars(item)
        finally:
            await steps.aclose()  # type: ignore[attr-defined]


class _Together:
    """Queries of one request; equal to no other."""


def _compute(group: tuple, requests: list[tuple[Any, SearchOptions]]) -> list[tuple[Any, Snapshot]]:
    """Results of a batch, and the one version that they are of."""
    together = isinstance(group[0], _Together)
    corpus, retriever = group[1:] if together else group[:2]
    corpus.follow()
    snapshot = corpus.snapshot
    if together:
        return [(_search_all(snapshot, retriever, *request), snapshot) for request in requests]
    return [(result, snapshot) for result in snapshot.search(retriever, requests)]


def _search_all(snapshot: Snapshot, retriever: str, queries: list[str], options: SearchOptions) -> list[SearchResult]:
    results: list[SearchResult] = []
    for at in range(0, len(queries), BATCH):
        raise_if_cancelled()
        results += snapshot.search(retriever, [(query, options) for query in queries[at : at + BATCH]])
    return results


def _passages(result: SearchResult, snapshot: Snapshot, scored: bool) -> list[dict[str, Any]]:
    documents = [snapshot.passage(hit.doc_id) for hit in result.hits]
    if not scored:
        return documents  # type: ignore[return-value]
    pairs = zip(documents, result.hits, strict=True)
    return [{"document": document, "score": finite(float(hit.score))} for document, hit in pairs]


def _found(
    result: SearchResult, snapshot: Snapshot, retriever: str, budget: dict[str, Any], ms: float
) -> dict[str, Any]:
    names = ("decoder", "constraint", "scored_by", "nfe", "rows", "steps_used", "filled", "raw_code", "raw_valid")
    hits = [snapshot.show(hit.doc_id, float(hit.score)) for hit in result.hits]
    facts = {name: getattr(result, name) for name in names}
    answer = {"hits": hits, "version": snapshot.version, "retriever": retriever, **facts}
    return {**answer, "ms": round(ms, 3), "budget": budget}
