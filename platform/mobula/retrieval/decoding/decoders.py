"""From a denoised code to a ranked list of documents: the decoders of a diffusion model (spec 6.2).

Every decoder starts with the call in which everything is masked. Its table ranks all documents by s(c) and is
the first denoising step as well, so ``match_rerank`` takes T calls (not T + 1) and ``best_of_n``
1 + n(T - 1) rows. T is ``steps_used``; without remasking, a step whose outcome is known
(one code left) takes no call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mobula.retrieval.decoding.batched_calls import Decoding, together
from mobula.retrieval.decoding.beam import beam_search
from mobula.retrieval.decoding.corpus import Corpus, top
from mobula.retrieval.decoding.denoise import Row, denoise
from mobula.retrieval.decoding.scores import chain
from mobula.retrieval.search import Hit, SearchOptions, SearchResult, StepEvent


@dataclass
class Request:
    """One request: where it searches, how, and, if they are wanted, the events of its steps.

    ``forbidden`` bool[L, K] forces an early error, see :class:`.denoise.Row`.
    """

    corpus: Corpus
    options: SearchOptions
    events: list[StepEvent] | None = None
    forbidden: np.ndarray | None = None

    def rng(self, run: int = 0) -> np.random.Generator:
        """Random numbers of one run of this request alone."""
        return np.random.default_rng([self.options.seed, run])

    def row(self, first: np.ndarray, run: int = 0) -> Row:
        """A docid to denoise. Of several runs the first is the one whose steps are told."""
        events = self.events if run == 0 else None
        return Row(self.corpus, self.options, first, self.rng(run), events, self.forbidden)


@dataclass
class Ranking:
    """Documents ``rows`` i64[k] with scores f64[k], best first, and what the result says about them."""

    rows: np.ndarray
    scores: np.ndarray
    scored_by: str
    filled: int = 0
    steps: int = 0
    raw: np.ndarray | None = None


Decoder = Callable[[Request], Decoding[Ranking]]


def everything_masked(corpus: Corpus) -> np.ndarray:
    """The question every decoder starts with, i64[1, L]."""
    return np.full((1, corpus.levels), -1, np.int64)


def one_pass(request: Request) -> Decoding[Ranking]:
    """All documents by s(c)."""
    first = (yield everything_masked(request.corpus))[0]
    scores = request.corpus.scores(first)
    rows = top(scores, request.options.k)
    return Ranking(rows, scores[rows], "one_pass")


def match(request: Request) -> Decoding[Ranking]:
    """Denoise once; documents by Hamming distance to the code, ties in corpus order."""
    corpus, options = request.corpus, request.options
    first = (yield everything_masked(corpus))[0]
    row = yield from denoise(request.row(first))
    scores = -corpus.distances(_projected(request, row.z, first)).astype(np.float64)
    rows = top(scores, options.k)
    return Ranking(rows, scores[rows], "hamming", steps=row.steps, raw=row.z)


def match_rerank(request: Request) -> Decoding[Ranking]:
    """Denoise once; the Hamming-nearest documents by s(c)."""
    first = (yield everything_masked(request.corpus))[0]
    row = yield from denoise(request.row(first))
    pool = _pool(request, row.z, first)
    return _rerank(request, pool, first, row)


def best_of_n(request: Request) -> Decoding[Ranking]:
    """n random runs; the union of their pools by s(c). The raw code is that of the run of largest s(c)."""
    first = (yield everything_masked(request.corpus))[0]
    rows = yield from together([denoise(request.row(first, run)) for run in range(request.options.n)])
    pool = np.unique(np.concatenate([_pool(request, row.z, first) for row in rows]))
    levels = np.arange(request.corpus.levels)
    best = max(rows, key=lambda row: first[levels, row.z].sum())
    ranking = _rerank(request, pool, first, best)
    ranking.steps = max(row.steps for row in rows)
    return ranking


def beam(request: Request) -> Decoding[Ranking]:
    """Any-order beam; documents of a code share its score, the rest follows in one-pass order."""
    corpus, options = request.corpus, request.options
    first = (yield everything_masked(corpus))[0]
    beams = yield from beam_search(corpus, options, first, request.rng(), request.events)
    rows, scores = _documents(request, beams.z, beams.scores, first)
    ranking = Ranking(rows, scores, f"beam_{options.beam_score}", raw=beams.z[0])
    ranking.steps = corpus.levels // options.beam_per_step
    return fill(ranking, corpus.scores(first), options.k)


def chain_rescore(request: Request) -> Decoding[Ranking]:
    """The one-pass leaders by the chain rule's log-likelihood, the rest in one-pass order."""
    corpus, options = request.corpus, request.options
    first = (yield everything_masked(corpus))[0]
    by_pass = corpus.scores(first)
    leaders = top(by_pass, options.rescore)
    # Documents of one code are scored once, so they tie.
    codes, code_of = np.unique(corpus.columns[:, leaders].T, axis=0, return_inverse=True)
    scores = (yield from chain(codes, first))[code_of]
    order = top(scores, options.k)
    return fill(Ranking(leaders[order], scores[order], "chain"), by_pass, options.k)


DECODERS: dict[str, Decoder] = {
    "one_pass": one_pass,
    "match": match,
    "match_rerank": match_rerank,
    "best_of_n": best_of_n,
    "beam": beam,
    "chain_rescore": chain_rescore,
}


def fill(ranking: Ranking, scores: np.ndarray, k: int) -> Ranking:
    """Add the best other documents by ``scores`` f[N] until there are min(k, N).

    Scores of two kinds do not compare: those of the added documents are shifted so that the best of them is 1
    below the last document found, and the list stays sorted.
    """
    missing = min(k, len(scores)) - len(ranking.rows)
    if missing <= 0:
        return ranking
    others = scores.astype(np.float64)
    others[ranking.rows] = -np.inf
    rows = top(others, missing)
    ceiling = ranking.scores[-1] - 1 if len(ranking.rows) else others[rows[0]]
    ranking.scores = np.concatenate([ranking.scores, others[rows] - others[rows[0]] + ceiling])
    ranking.rows = np.concatenate([ranking.rows, rows])
    ranking.filled = missing
    return ranking


def result(request: Request, ranking: Ranking, gold: set[str] | None) -> SearchResult:
    """The ranking as hits; ``raw_*`` say what the generated code was before matching or projection."""
    corpus, options = request.corpus, request.options
    pairs = zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True)
    search_result = SearchResult(
        [Hit(corpus.doc_ids[row], score) for row, score in pairs],
        steps_used=ranking.steps,
        decoder=options.decoder,
        constraint=options.constraint,
        scored_by=ranking.scored_by,
        filled=ranking.filled,
    )
    if ranking.raw is not None:
        owners = corpus.bucket(ranking.raw)
        search_result.raw_code = tuple(ranking.raw.tolist())
        search_result.raw_valid = len(owners) > 0
        if gold is not None:
            search_result.raw_exact = any(corpus.doc_ids[row] in gold for row in owners.tolist())
    return search_result


def _projected(request: Request, code: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The code i64[L], moved into the corpus if ``constraint`` is ``project``."""
    if request.options.constraint != "project":
        return code
    return request.corpus.nearest(code, request.corpus.scores(first))


def _pool(request: Request, code: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The ``pool`` Hamming-nearest documents and all that tie with the last of them."""
    corpus = request.corpus
    distances = corpus.distances(_projected(request, code, first))
    size = min(request.options.pool, len(corpus))
    return np.flatnonzero(distances <= np.partition(distances, size - 1)[size - 1])


def _rerank(request: Request, pool: np.ndarray, first: np.ndarray, row: Row) -> Ranking:
    scores = request.corpus.scores(first)
    rows = pool[top(scores[pool], request.options.k)]
    ranking = Ranking(rows, scores[rows].astype(np.float64), "one_pass", steps=row.steps, raw=row.z)
    return fill(ranking, scores, request.options.k)


def _documents(
    request: Request, codes: np.ndarray, scores: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The first k documents of ``codes`` i64[B, L], best first, with their code's score."""
    rows: list[np.ndarray] = []
    code_scores: list[float] = []
    taken: set[bytes] = set()
    for code, score in zip(codes, scores.tolist(), strict=True):
        code = _projected(request, code, first)
        if code.tobytes() in taken or len(code_scores) >= request.options.k:
            continue
        taken.add(code.tobytes())
        bucket = request.corpus.bucket(code)
        rows.append(bucket)
        code_scores.extend([score] * len(bucket))
    all_rows = np.concatenate(rows)[: request.options.k]
    return all_rows, np.array(code_scores[: request.options.k])
