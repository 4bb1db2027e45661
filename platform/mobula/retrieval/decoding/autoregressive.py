"""Decoding the autoregressive twin: left to right through the trie of corpus codes (spec 6.4).

Shapes: R queries of a tile, G hypotheses each, L levels, K codes a level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mobula.cancellation import raise_if_cancelled
from mobula.retrieval.decoding.batched_calls import device_of, encode, require_fit, tiles
from mobula.retrieval.decoding.beam import best_changed
from mobula.retrieval.decoding.corpus import Corpus, top
from mobula.retrieval.decoding.decoders import Ranking, Request, fill, result
from mobula.retrieval.docids.scoring import top_k
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.docids.trie import OUTSIDE
from mobula.retrieval.network import DocidModel, Memory
from mobula.retrieval.search import AR_DECODERS, MOST_EXHAUSTIVE, BadSearch, SearchOptions, SearchResult, StepEvent

CODES_PER_CALL = 256


class ArDecoder:
    """Searches a docid table with an autoregressive model.

    ``greedy`` and ``beam`` follow the trie with cached keys and values, one call a level for all hypotheses of
    several queries, no length penalty; documents of a code share its log-likelihood. ``exhaustive`` scores
    every code teacher-forced, which shows the model without the beam's error (at most 5,000 documents).
    A beam that ends with fewer than k documents is filled by the number of leading codes shared with the best
    hypothesis, then in corpus order.

    Holds no state of a request, so threads may share it. A changed table needs a new decoder.
    """

    def __init__(self, model: DocidModel, table: DocidTable) -> None:
        require_fit(model, table, "autoregressive")
        self.model, self.corpus = model, Corpus.of(table)

    def search(
        self,
        query: dict[str, Tensor],
        options: Sequence[SearchOptions],
        gold: Sequence[set[str]] | None = None,
        trace: bool = False,
        forbidden: Sequence[np.ndarray] | None = None,
    ) -> list[SearchResult]:
        """As :meth:`.Decoder.search`, ``options.decoder`` being greedy, beam or exhaustive."""
        requests = [self._request(one, trace) for one in options]
        if forbidden is not None:
            for request, codes in zip(requests, forbidden, strict=True):
                request.forbidden = codes
        if not len(self.corpus):
            return [SearchResult([], decoder=one.decoder, constraint="trie") for one in options]
        memory = encode(self.model, query)
        results: dict[int, SearchResult] = {}
        for width, group in _by_width(options).items():
            size = _queries_per_tile(self.model, width)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                beam = TrieBeam(self, memory, part, [requests[i] for i in part], width)
                for _ in range(self.corpus.levels):
                    beam.advance()
                results.update(zip(part, beam.results(gold), strict=True))
        for i in range(len(options)):
            if options[i].decoder == "exhaustive":
                results[i] = self._exhaustive(requests[i], memory, i, None if gold is None else gold[i])
        return [results[i] for i in range(len(options))]

    def trace(self, query: dict[str, Tensor], options: SearchOptions) -> Iterator[StepEvent | SearchResult]:
        """What each level changed in the best hypothesis, as it happens, and at last the result."""
        request = self._request(options, trace=True)
        if options.decoder == "exhaustive" or not len(self.corpus):
            yield self.search(query, [options])[0]
            return
        beam = TrieBeam(self, encode(self.model, query), [0], [request], _width(options))
        for _ in range(self.corpus.levels):
            beam.advance()
            yield beam.events[0][-1]
        yield beam.results(None)[0]

    def _request(self, options: SearchOptions, trace: bool) -> Request:
        if options.decoder not in AR_DECODERS:
            raise BadSearch(f"decoder={options.decoder}: an autoregressive model has {', '.join(AR_DECODERS)}")
        if options.decoder == "exhaustive" and len(self.corpus) > MOST_EXHAUSTIVE:
            raise BadSearch(f"exhaustive scores at most {MOST_EXHAUSTIVE} documents, the corpus has {len(self.corpus)}")
        return Request(self.corpus, options, [] if trace else None)

    @torch.inference_mode()
    def _exhaustive(self, request: Request, memory: Memory, index: int, gold: set[str] | None) -> SearchResult:
        """All documents by log p(c | q)."""
        codes, code_of = self.corpus.distinct
        device = device_of(self.model)
        one = memory.rows(torch.tensor([index], device=device))
        scores = np.empty(len(codes))
        starts = range(0, len(codes), CODES_PER_CALL)
        for start in starts:
            part = codes[start : start + CODES_PER_CALL]
            full = part[np.minimum(np.arange(CODES_PER_CALL), len(part) - 1)]
            z = torch.from_numpy(full).to(device)
            log_probs = torch.log_softmax(self.model.logits(one, z[None])[0].float(), -1)
            taken = log_probs.gather(-1, z[..., None]).squeeze(-1).double().sum(-1)
            scores[start : start + len(part)] = taken[: len(part)].cpu().numpy()
        by_document = scores[code_of]
        rows = top(by_document, request.options.k)
        raw = codes[scores.argmax()]
        search_result = result(request, Ranking(rows, by_document[rows], "log_likelihood", raw=raw), gold)
        search_result.nfe, search_result.rows, search_result.constraint = len(starts), len(codes), "trie"
        return search_result


class TrieBeam:
    """Beams of equal width for a tile of queries, one level deeper with each :meth:`advance`.

    A tile's size depends on the width alone, so that the bits of a result do not depend on its companions; what
    is missing is padded. Hypotheses that found no continuation stay with score -inf.
    """

    def __init__(
        self,
        decoder: ArDecoder,
        memory: Memory,
        index: Sequence[int],
        requests: list[Request],
        width: int,
    ) -> None:
        self.model, self.corpus = decoder.model, decoder.corpus
        self.index, self.requests, self.width = list(index), requests, width
        self.device = device_of(self.model)
        queries = _queries_per_tile(self.model, width)
        padded = [index[min(i, len(index) - 1)] for i in range(queries)]
        with torch.inference_mode():
            self.memory = memory.rows(torch.tensor(padded, device=self.device))
            self.cache = self.model.start(self.memory, 1)
        self.previous: Tensor | None = None
        self.level = 0
        self.nodes = self.corpus.trie.root(queries, 1)
        self.scores = np.zeros((queries, 1))
        self.codes = np.full((queries, 1, self.corpus.levels), -1, np.int64)
        self.probs = np.zeros((queries, 1, self.corpus.levels))
        self.rows = np.zeros(queries, np.int64)
        self.events: list[list[StepEvent]] = [[] for _ in requests]

    def advance(self) -> None:
        """Extend every hypothesis by one code and keep the ``width`` best of each query."""
        log_probs = self._step()
        self.rows += (self.scores > -np.inf).sum(1)
        possible = self.corpus.trie.mask(self.nodes)
        totals = np.where(possible, log_probs + self.scores[:, :, None], -np.inf)
        if self.level == 0:
            self._force_error(totals)
        flat = totals.reshape(len(totals), -1)
        chosen, self.scores = top_k(flat, self.width)
        parents, codes = np.divmod(chosen, log_probs.shape[2])
        query = np.arange(len(totals))[:, None]
        before = self.codes[:, 0]
        # A hypothesis without continuation must not come back to life by another edge.
        alive = self.scores > -np.inf
        nodes = self.corpus.trie.step(self.nodes[query, parents], codes)
        self.nodes = np.where(alive, nodes, OUTSIDE)
        self.codes, self.probs = self.codes[query, parents], self.probs[query, parents]
        self.codes[:, :, self.level] = codes
        self.probs[:, :, self.level] = np.exp(log_probs[query, parents, codes])
        with torch.inference_mode():
            self.cache = self.cache.reorder(torch.from_numpy(parents).to(self.device))
        self.previous = torch.from_numpy(codes).to(self.device)
        self.level += 1
        self._tell(before)

    def results(self, gold: Sequence[set[str]] | None) -> list[SearchResult]:
        """The documents of the finished hypotheses, for each request."""
        results = []
        for i, request in enumerate(self.requests):
            ranking = self._ranking(i, request.options.k)
            one = result(request, ranking, None if gold is None else gold[self.index[i]])
            one.nfe, one.rows, one.constraint = self.corpus.levels, int(self.rows[i]), "trie"
            one.trace = self.events[i]
            results.append(one)
        return results

    @torch.inference_mode()
    def _step(self) -> np.ndarray:
        """Log-probabilities f64[R, G, K] of the next level."""
        raise_if_cancelled()
        logits, self.cache = self.model.step(self.memory, self.cache, self.previous)
        return torch.log_softmax(logits.float(), -1).double().cpu().numpy()

    def _force_error(self, totals: np.ndarray) -> None:
        """Leave a request with a forced early error only the most probable wrong code of the first level."""
        for i, request in enumerate(self.requests):
            if request.forbidden is None:
                continue
            wrong = np.where(request.forbidden[0], -np.inf, totals[i, 0])
            best = int(wrong.argmax())
            if wrong[best] > -np.inf:
                totals[i, 0] = -np.inf
                totals[i, 0, best] = wrong[best]

    def _tell(self, before: np.ndarray) -> None:
        for i, request in enumerate(self.requests):
            if request.events is None:
                continue
            now = self.codes[i, 0]
            prefix = self.corpus.columns[: self.level] == now[: self.level, None]
            left = int(prefix.all(0).sum())
            self.events[i].append(best_changed(self.level, before[i], now, self.probs[i, 0], left))

    def _ranking(self, i: int, k: int) -> Ranking:
        rows: list[np.ndarray] = []
        scores: list[float] = []
        for node, score in zip(self.nodes[i].tolist(), self.scores[i].tolist(), strict=True):
            if score == -np.inf or len(scores) >= k:
                break
            bucket = self.corpus.positions(self.corpus.trie.documents(node))
            rows.append(bucket)
            scores.extend([score] * len(bucket))
        best = self.codes[i, 0]
        ranking = Ranking(np.concatenate(rows)[:k], np.array(scores[:k]), "log_likelihood", raw=best)
        if len(ranking.rows) >= k:
            return ranking
        shared = (self.corpus.columns == best[:, None]).cumprod(0).sum(0)
        return fill(ranking, shared.astype(np.float64), k)


def _by_width(options: Sequence[SearchOptions]) -> dict[int, list[int]]:
    """Requests by beam width; `exhaustive` has none."""
    groups: dict[int, list[int]] = {}
    for i, one in enumerate(options):
        if one.decoder != "exhaustive":
            groups.setdefault(_width(one), []).append(i)
    return groups


def _width(options: SearchOptions) -> int:
    return 1 if options.decoder == "greedy" else options.beam


def _queries_per_tile(model: DocidModel, width: int) -> int:
    """As many as fill a narrow tile: a query that comes alone pays for the padding."""
    return max(1, tiles(device_of(model))[0] // width)
