"""Generating n-grams: the batched beam over the index against one that asks a Python callback for every hypothesis.

Both arms search the same index with the same language model and find the same keys. The callback is what generation
libraries call ``prefix_allowed_tokens_fn``: given the codes of one hypothesis it looks them up in the index and returns
the set of codes that may follow; the scores of all others are masked. It generates for one query at a time, as such
loops do when every query has its own constraint. The batched arm takes the queries of a group together.

The arms take turns on every group of queries; a ratio is that of the group's times. The language model is trained here
for a few steps, so that hypotheses lie where those of a real one would.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import ratio
from mobula.data import DataConfig, load_retrieval
from mobula.retrieval.build import ModelConfig
from mobula.retrieval.config import PseudoQueriesConfig
from mobula.retrieval.decoding.batched_calls import encode
from mobula.retrieval.network import Memory
from mobula.retrieval.ngrams.config import NgramConfig
from mobula.retrieval.ngrams.generate import NONE, generate
from mobula.retrieval.ngrams.index import NgramIndex, is_key
from mobula.retrieval.ngrams.language import Speaker
from mobula.retrieval.ngrams.retriever import NgramRetriever, load
from mobula.retrieval.ngrams.stream import FIRST, TITLE, TITLE_END
from mobula.retrieval.ngrams.task import write_ngrams
from mobula.retrieval.search import SearchOptions
from mobula.threads import one_thread
from mobula.training import TrainingConfig, fit

TRAINING = TrainingConfig(examples=4_000, batch=128, lr=4e-3, workers=0)
Key = tuple[int, ...]


def run(documents: int = 1000, queries: int = 160) -> dict[str, Any]:
    """Ratios of times, callback over batched, with the times a query takes in each arm and in a whole search.

    Both arms pay for the language model, the batched one less since queries share calls of its layers. The second
    ratio leaves the model's time out on both sides: it is that of the constraint, the choice of hypotheses and masks.
    """
    data = load_retrieval(DataConfig(name="functions", max_documents=documents, keep="relevant"), quiet=True)
    config = NgramConfig()
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        task = write_ngrams(
            Path(folder) / "prepared",
            data.documents,
            data.queries["train"],
            data.queries["dev"],
            config=config,
            pseudo_queries=PseudoQueriesConfig(),
            model=ModelConfig(width=64),
            seed=0,
        )
        found = fit(task, TRAINING, Path(folder) / "training", seed=0, name="growth_ngrams")
        retriever = load(Path(folder) / "prepared", found.weights)
        texts = [query.text for query in data.queries["test"]][:queries]
        measured = _measure(retriever, texts)
    return {"name": "growth_ngrams", **measured, "conditions": _conditions(retriever, len(texts))}


class _Metered:
    """A language model for :func:`generate` that adds up the time it is at work."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker, self.vocabulary, self.seconds = speaker, speaker.vocabulary, 0.0
        network = speaker.network
        self.network = SimpleNamespace(levels=network.levels, start=network.start, step=self._timed(network.step))
        self.log_probs = self._timed(speaker.log_probs)

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            found = work(*arguments)
            self.seconds += time.perf_counter() - started
            return found

        return timed


def _measure(retriever: NgramRetriever, texts: list[str]) -> dict[str, Any]:
    index, speaker, config = retriever.indexes["text"], retriever.speaker, retriever.config
    meter: Any = _Metered(speaker)
    times: dict[str, list[float]] = {"batched": [], "callback": []}
    outside: dict[str, list[float]] = {"batched": [], "callback": []}
    whole: list[float] = []
    agreed = 0
    size = config.together
    groups = [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]
    for group in groups[:1]:  # warms up
        _batched(meter, encode(speaker.network, retriever.inputs.features(group, "text")), index, config)
    for group in groups:
        memory = encode(speaker.network, retriever.inputs.features(group, "text"))
        keys = {}
        for arm, work in (("batched", _batched), ("callback", _with_callback)):
            meter.seconds, started = 0.0, time.perf_counter()
            keys[arm] = work(meter, memory, index, config)
            seconds = time.perf_counter() - started
            times[arm].append(1000 * seconds / size)
            outside[arm].append(1000 * (seconds - meter.seconds) / size)
        started = time.perf_counter()
        retriever.search(group, [SearchOptions(k=10)] * size)
        whole.append(1000 * (time.perf_counter() - started) / size)
        agreed += sum(a == b for a, b in zip(keys["batched"], keys["callback"], strict=True))
    ms = {**times, "batched_outside_the_model": outside["batched"], "callback_outside_the_model": outside["callback"]}
    return {
        "ratios": {
            "callback_over_batched": ratio(times["callback"], times["batched"]),
            "callback_over_batched_outside_the_model": ratio(outside["callback"], outside["batched"]),
        },
        "ms_per_query": {arm: round(float(np.median(v)), 3) for arm, v in {**ms, "whole_search": whole}.items()},
        "queries_with_equal_keys": round(agreed / (len(groups) * size), 4),
    }


def _conditions(retriever: NgramRetriever, queries: int) -> dict[str, Any]:
    index = retriever.indexes["text"]
    return {
        "documents": len(index),
        "tokens": index.tokens,
        "codes": retriever.vocabulary.size,
        "queries": queries,
        "queries_in_a_group": retriever.config.together,
        "beam": retriever.config.beam,
        "max_len": retriever.config.max_len,
        "width": retriever.model.shape.width,
        "layers": retriever.model.shape.layers,
        "threads": 1,
    }


def _batched(speaker: Speaker, memory: Memory, index: NgramIndex, config: NgramConfig) -> list[set[Key]]:
    found = generate(speaker, memory, index, width=config.beam, max_len=config.max_len, together=config.together)
    return [{tuple(code for code in row if code != NONE) for row in one.codes.tolist()} for one in found]


def _with_callback(speaker: Speaker, memory: Memory, index: NgramIndex, config: NgramConfig) -> list[set[Key]]:
    first = {TITLE, *range(FIRST, len(index.frequencies))}

    def allowed(prefix: Key) -> set[int]:
        """What may follow ``prefix`` in the corpus."""
        title = prefix[:1] == (TITLE,)
        if not prefix:
            return first
        if prefix[-1] == TITLE_END or (len(prefix) == config.max_len and not title):
            return set()
        ranges = index.find(np.array([prefix], np.int32))
        return set(index.successors(ranges, np.array([title]))[1].tolist())

    return [_one_query(speaker, memory.rows(torch.tensor([i])), config.beam, allowed) for i in range(memory.size)]


@torch.inference_mode()
def _one_query(speaker: Speaker, memory: Memory, width: int, allowed: Callable[[Key], set[int]]) -> set[Key]:
    """A beam whose every hypothesis is masked by what the callback allows."""
    network, codes = speaker.network, speaker.vocabulary.size
    cache, previous = network.start(memory, 1), None
    hypotheses: list[Key] = [()]
    scores = torch.zeros(1)
    keys: set[Key] = set()
    for _ in range(network.levels):
        hidden, cache = network.step(memory, cache, previous)
        log_probs = speaker.log_probs(hidden[0])
        mask = torch.full_like(log_probs, float("-inf"))
        for row, hypothesis in enumerate(hypotheses):
            if scores[row] > -torch.inf:
                mask[row, list(allowed(hypothesis))] = 0.0
        best = (log_probs + mask + scores[:, None]).flatten().topk(width)
        parents, following = best.indices // codes, best.indices % codes
        scores = best.values
        hypotheses = [(*hypotheses[p], c) for p, c in zip(parents.tolist(), following.tolist(), strict=True)]
        alive = [h for h, score in zip(hypotheses, scores.tolist(), strict=True) if score > -torch.inf]
        if not alive:
            break
        keys.update(h for h in alive if len(h) > 1 and is_key(h))
        cache, previous = cache.reorder(parents[None]), following[None]
    return keys


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
