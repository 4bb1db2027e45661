"""Decoding docids: from a model and a docid table to ranked documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from mobula.retrieval.decoding.autoregressive import ArDecoder
from mobula.retrieval.decoding.batched_calls import Call, Network, require_fit
from mobula.retrieval.decoding.corpus import Corpus
from mobula.retrieval.decoding.decoders import DECODERS, Ranking, Request, result
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.network import DocidModel
from mobula.retrieval.search import BadSearch, SearchOptions, SearchResult, StepEvent

__all__ = ["ArDecoder", "Decoder"]


class Decoder:
    """Searches a docid table with a masked-diffusion model.

    Holds no state of a request, so threads may share it. A changed table needs a new decoder; requests under
    way finish on the old one.
    """

    def __init__(self, model: DocidModel, table: DocidTable) -> None:
        require_fit(model, table, "diffusion")
        self.model, self.corpus = model, Corpus.of(table)

    def search(
        self,
        query: dict[str, Tensor],
        options: Sequence[SearchOptions],
        gold: Sequence[set[str]] | None = None,
        trace: bool = False,
        forbidden: Sequence[np.ndarray] | None = None,
    ) -> list[SearchResult]:
        """Rank documents for B queries, each under its own options: min(k, N) distinct hits, best first.

        ``query`` holds tensors [B, ...], padded to the model's query length whatever the batch; ``gold`` the
        relevant ids of each query, for ``raw_exact``. With ``trace`` results carry the steps (of best_of_n,
        those of the first run). ``forbidden`` bool[L, K] per query forces an early error (:mod:`.recovery`).

        Raises:
            BadSearch: for options that contradict each other or do not fit the model.
        """
        requests = [self._request(one, trace) for one in options]
        if forbidden is not None:
            for request, codes in zip(requests, forbidden, strict=True):
                request.forbidden = codes
        if not len(self.corpus):
            return [_nothing(one) for one in options]
        network, calls = self._start(query, requests)
        while under_way := [call for call in calls if call.pending is not None]:
            network.round(under_way)
        golds = [None] * len(requests) if gold is None else gold
        return [_finish(*row) for row in zip(requests, calls, golds, strict=True)]

    def trace(self, query: dict[str, Tensor], options: SearchOptions) -> Iterator[StepEvent | SearchResult]:
        """The denoising steps of one query as they happen, then its result."""
        request = self._request(options, trace=True)
        if not len(self.corpus):
            yield _nothing(options)
            return
        network, (call,) = self._start(query, [request])
        sent = 0
        while call.pending is not None:
            network.round([call])
            events = request.events or []
            yield from events[sent:]
            sent = len(events)
        yield _finish(request, call, None)

    def _request(self, options: SearchOptions, trace: bool) -> Request:
        if options.decoder not in DECODERS:
            raise BadSearch(f"decoder={options.decoder}: a diffusion model has {', '.join(DECODERS)}")
        options.check(self.corpus.levels)
        return Request(self.corpus, options, [] if trace else None)

    def _start(self, query: dict[str, Tensor], requests: list[Request]) -> tuple[Network, list[Call[Ranking]]]:
        network = Network.encode(self.model, query)
        if network.memory.size != len(requests):
            raise BadSearch(f"{network.memory.size} queries but {len(requests)} options; give one each")
        calls = [
            Call(i, DECODERS[request.options.decoder](request), request.options.cfg)
            for i, request in enumerate(requests)
        ]
        for call in calls:
            call.advance(None)
        return network, calls


def _finish(request: Request, call: Call[Ranking], gold: set[str] | None) -> SearchResult:
    search_result = result(request, call.result, gold)
    search_result.nfe, search_result.rows = call.nfe, call.rows
    search_result.trace = request.events or []
    return search_result


def _nothing(options: SearchOptions) -> SearchResult:
    return SearchResult([], decoder=options.decoder, constraint=options.constraint)
