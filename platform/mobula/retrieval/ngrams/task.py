"""Training the language model of n-gram retrieval: query -> span of a relevant document.

:func:`write_ngrams` prepares a folder of the initial documents and their training queries; an :class:`NgramTask`
reads it, wherever it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobula.artifacts import sha256, write_text
from mobula.config import digest
from mobula.data.records import Document, Query, RetrievalData
from mobula.errors import DataError
from mobula.retrieval.build import ModelConfig
from mobula.retrieval.config import PseudoQueriesConfig
from mobula.retrieval.inputs import StoredFeatures
from mobula.retrieval.network import DocidTransformer, TokenCodes
from mobula.retrieval.ngrams.config import NgramConfig
from mobula.retrieval.ngrams.generate import NONE
from mobula.retrieval.ngrams.index import Postings
from mobula.retrieval.ngrams.language import (
    MARKS_IN_TITLE,
    MarkedInputs,
    build_network,
    code_rows,
    network_shape,
    unseen_vectors,
    vectors,
)
from mobula.retrieval.ngrams.retriever import Corpus, NgramRetriever
from mobula.retrieval.ngrams.stream import FIRST, TITLE, Streams
from mobula.retrieval.prepare import sample, training_examples
from mobula.retrieval.tasks import check_collapse, dev_measures
from mobula.threads import one_thread
from mobula.training.task import Task

TOP = 10
DONE = "prepared.txt"


@dataclass
class NgramTask(Task):
    """Train the language model on (query, span) pairs by the cross-entropy of every code that is no padding.

    With ``unseen`` tokens of no initial document stand in the softmax as well (ours), drawn anew for every batch from
    the rest of the tokenizer's vocabulary. Without them training never lowers the probability of a token that it does
    not know: once later documents bring some, these take up to half of all probability for a few per cent of the text,
    which favours later documents. With them the model may learn to avoid whatever is new, which keeps it from later
    documents on another subject.

    ``guarded``: a collapsed model ends the training, see :class:`mobula.retrieval.tasks.DocidTask`.
    """

    directory: Path
    guarded: bool = True

    @cached_property
    def opened(self) -> _Opened:
        """The prepared folder."""
        return _Opened(self.directory)

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.opened.targets)

    def identity(self) -> str:
        """Hash of everything the task reads."""
        files = sorted(p for p in self.directory.rglob("*") if p.is_file())
        return digest({str(p.relative_to(self.directory)): sha256(p) for p in files})

    def build(self) -> DocidTransformer:
        """A freshly initialised language model."""
        corpus = self.opened.corpus
        return build_network(self.opened.shape, corpus.vocabulary, corpus.tokenizer)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Token ids i64[B, n] of queries, spans i64[B, L], padded with -1, and vectors f32[m, D] of unseen tokens."""
        rows = indices.numpy()
        spans = np.array(self.opened.targets[rows], np.int64)
        return {
            **self.opened.queries.rows(self.opened.query_of[rows]),
            "spans": torch.from_numpy(spans),
            "unseen": self._unseen(generator),
        }

    def weights(self, indices: Tensor) -> Tensor:
        """How many codes each span has: the loss is their mean."""
        return torch.from_numpy((np.array(self.opened.targets[indices.numpy()]) != NONE).sum(1))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean cross-entropy of the codes in nats; only positions with a code are scored."""
        if not isinstance(model, DocidTransformer):
            raise TypeError(f"an n-gram language model is a DocidTransformer, found {type(model).__name__}")
        spans = batch["spans"]
        given = spans != NONE
        hidden = model.hidden(model.memory({"ids": batch["ids"]}), spans.clamp(min=0)[:, None]).squeeze(1)
        hidden = hidden[given]
        logits = model.codes.score(hidden.unsqueeze(1), slice(None)).squeeze(1)
        if len(batch["unseen"]):
            logits = torch.cat([logits, _unseen_logits(model.codes, hidden, batch["unseen"])], 1)
        return F.cross_entropy(logits.float(), spans[given]), {}

    def evaluate(self, model: DocidTransformer) -> dict[str, float]:
        """Dev Hit@1, Hit@10, MRR@10 and the share of distinct top-1 documents, by searching the initial documents."""
        retriever = NgramRetriever("ngram", model, self.opened.corpus)
        device = next(model.parameters()).device
        features = {
            view: {name: values.to(device) for name, values in stored.all().items()}
            for view, stored in self.opened.dev.items()
        }
        with one_thread():
            results = retriever.search_features(features, [TOP] * len(self.opened.dev_gold))
        return dev_measures([[hit.doc_id for hit in result.hits] for result in results], self.opened.dev_gold)

    def check(self, metrics: dict[str, float], step: int, steps: int) -> None:
        """See :func:`mobula.retrieval.tasks.check_collapse`."""
        gold = self.opened.dev_gold
        check_collapse("ngram", metrics["distinct_top1"], gold, step, steps, fatal=self.guarded)

    def _unseen(self, generator: torch.Generator) -> Tensor:
        """Vectors of tokens without a code; none for a limited vocabulary, which no token ever joins."""
        corpus = self.opened.corpus
        count = 0 if corpus.vocabulary.limited else min(corpus.config.unseen, len(self.opened.unseen))
        sampled = torch.randint(max(1, len(self.opened.unseen)), (count,), generator=generator)
        return vectors(corpus.tokenizer, self.opened.unseen[sampled.numpy()])


def _unseen_logits(codes: nn.Module, hidden: Tensor, unseen: Tensor) -> Tensor:
    """Logits [n, m] of tokens that are no codes, as decoding will score them once they are."""
    if not isinstance(codes, TokenCodes):
        raise TypeError("the model's codes are not tokens")
    return hidden @ code_rows(codes, unseen_vectors(codes, unseen))[1].T


class _Opened:
    """Arrays of a prepared folder."""

    def __init__(self, directory: Path) -> None:
        self.corpus, self.shape = Corpus.load(directory)
        self.targets = np.load(directory / "targets.npy", mmap_mode="r", allow_pickle=False)
        self.query_of = np.load(directory / "query_of.npy", allow_pickle=False)
        self.queries = StoredFeatures(directory / "queries")
        self.dev = {view: StoredFeatures(directory / "dev" / view) for view in self.corpus.config.views}
        self.unseen = self.corpus.vocabulary.absent
        gold = (directory / "dev_gold.txt").read_text(encoding="utf-8")
        self.dev_gold = [set(line.split("\t")) for line in gold.split("\n")]


def write_ngrams(
    directory: Path,
    documents: Sequence[Document],
    train_queries: Sequence[Query],
    dev_queries: Sequence[Query],
    *,
    held_out: Sequence[Query] = (),
    config: NgramConfig,
    pseudo_queries: PseudoQueriesConfig,
    model: ModelConfig,
    seed: int,
) -> NgramTask:
    """Prepare ``directory``, unless that is done, and return the task that reads it.

    Everything is fitted on ``documents``: those that are there from the beginning. ``pseudo_queries`` says which
    stand beside the training queries; none of them is a near-duplicate of a dev or ``held_out`` query of the same
    document.

    Raises:
        DataError: if there is nothing to train on.
        ConfigError: for a backbone that n-grams cannot be generated with.
    """
    if not (directory / DONE).is_file():
        corpus = Corpus.fit(documents, config, seed)
        shape = network_shape(model, corpus.vocabulary, config.max_len, corpus.tokenizer.dim)
        corpus.save(directory, shape)
        inputs = MarkedInputs(corpus.tokenizer, model.query_len)
        queries = {"train": list(train_queries), "dev": list(dev_queries), "held_out": list(held_out)}
        data = RetrievalData("ngrams", "", "", list(documents), queries)
        _write_examples(directory, corpus, *training_examples(pseudo_queries, data, seed), inputs, seed)
        _write_dev(directory, sample(queries["dev"], config.dev_queries, seed), inputs, config.views)
        write_text(directory / DONE, corpus.fitted_on)
    return NgramTask(directory)


def _write_examples(
    directory: Path, corpus: Corpus, texts: list[str], pairs: np.ndarray, inputs: MarkedInputs, seed: int
) -> None:
    """Targets of every (query, document) pair in every view, and the features of the queries."""
    (directory / "queries").mkdir(parents=True, exist_ok=True)
    codes = [corpus.vocabulary.codes(ids) for ids in inputs.embedding.encode(texts)]
    spans: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    features: list[np.ndarray] = []
    for number, view in enumerate(corpus.config.views):
        targets = SpanTargets(corpus.streams[view], corpus.config, view, np.random.default_rng([seed, number]))
        sampled = [targets.draw(codes[query], document) for query, document in pairs.tolist()]
        spans.append(targets.codes(np.concatenate(sampled)))
        owners.append(number * len(texts) + np.repeat(pairs[:, 0], [len(spans_of) for spans_of in sampled]))
        features.append(inputs.features(texts, view)["ids"].numpy())
    if not any(map(len, spans)):
        raise DataError("nothing to train on: the documents of the training queries have no token")
    np.save(directory / "targets.npy", np.concatenate(spans), allow_pickle=False)
    np.save(directory / "query_of.npy", np.concatenate(owners), allow_pickle=False)
    np.save(directory / "queries" / "ids.npy", np.concatenate(features), allow_pickle=False)


def _write_dev(directory: Path, queries: list[Query], inputs: MarkedInputs, views: Sequence[str]) -> None:
    for view in views:
        (directory / "dev" / view).mkdir(parents=True, exist_ok=True)
        ids = inputs.features([query.text for query in queries], view)["ids"].numpy()
        np.save(directory / "dev" / view / "ids.npy", ids, allow_pickle=False)
    write_text(directory / "dev_gold.txt", "\n".join("\t".join(query.gold) for query in queries))


class SpanTargets:
    """Draws what a query of a document is trained to generate in a view.

    Windows of ``max_len`` tokens (of a shorter text, all of it) are drawn with probability proportional to
    exp(sharpness * overlap), the overlap being the idf of the window's tokens that the query holds. Documents with a
    title are also asked for it.
    """

    def __init__(self, streams: Streams, config: NgramConfig, view: str, rng: np.random.Generator) -> None:
        self.streams, self.config, self.rng = streams, config, rng
        self.windows = {"title": 0, "query": config.query_spans}.get(view, config.spans)
        self.titles = config.titles if view in ("text", "title") else 0
        postings = Postings.of(streams)
        self.idf = np.log(len(streams) / np.maximum(1, np.bincount(postings.code)))
        positions = np.arange(len(streams.codes))
        marks = np.flatnonzero(streams.codes < FIRST)
        # Where the text that a position belongs to ends, and where windows may begin.
        self.end = marks[np.searchsorted(marks, positions)]
        begins = np.ones(len(positions), bool)
        begins[1:] = streams.codes[:-1] < FIRST
        self.begins = (streams.codes >= FIRST) & (begins | (self.end - positions >= config.max_len))

    def draw(self, query: np.ndarray, document: int) -> np.ndarray:
        """Begin and end i64[m, 2], in the streams, of the targets of a query with ``query`` codes."""
        low, high = self.streams.starts[document : document + 2]
        codes = self.streams.codes[low:high]
        titles = self.titles if codes[0] == TITLE else 0
        title = np.tile([low, self.end[min(low + 1, high - 1)] + 1], (titles, 1))
        begins = low + np.flatnonzero(self.begins[low:high])
        if not (self.windows and len(begins)):
            return title
        ends = np.minimum(begins + self.config.max_len, self.end[begins])
        known = query[query < len(self.idf)]
        gain = np.zeros(len(self.idf))
        gain[known] = self.idf[known]
        sums = np.concatenate([[0.0], np.cumsum(gain[codes])])
        overlap = sums[ends - low] - sums[begins - low]
        cumulative = np.cumsum(np.exp(self.config.sharpness * (overlap - overlap.max())))
        sampled = np.searchsorted(cumulative, self.rng.random(self.windows) * cumulative[-1], side="right")
        # The largest random number, rounded up, is behind the last window.
        sampled = np.minimum(sampled, len(begins) - 1)
        return np.concatenate([title, np.column_stack([begins[sampled], ends[sampled]])])

    def codes(self, spans: np.ndarray) -> np.ndarray:
        """The codes i32[m, L] of spans i64[m, 2], padded with -1."""
        position = spans[:, :1] + np.arange(self.config.max_len + MARKS_IN_TITLE)
        codes = self.streams.codes[np.minimum(position, len(self.streams.codes) - 1)]
        return np.where(position < spans[:, 1:], codes, np.int32(NONE))
