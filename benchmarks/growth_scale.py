"""100,000 documents from disk to search: time of each stage, of insertions and searches, and peak memory.

In a process of its own, so that peak memory is that of this path: ``python -m benchmarks.growth_scale``. Documents are
spliced from the texts of two function documents. Docids are fitted on all 100,000; then these are admitted in batches
to a table of the first ones, over which a diffusion model and its autoregressive twin search, and at last a few more.
The encoder is wordllama. The networks are untrained: no time depends on how well they know the documents.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mobula.data import DataConfig, Document, Query, RetrievalData, export, load_retrieval
from mobula.data.duplicates import near_pairs
from mobula.data.pseudo_queries import body
from mobula.models.text import load_static
from mobula.retrieval.arms import parse
from mobula.retrieval.build import ModelConfig, build_model
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.space import fit_space
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.inputs import TokenInputs
from mobula.retrieval.search import SearchOptions
from mobula.threads import one_thread

SIZES = (1000, 10_000, 50_000, 100_000)
INSERTED = (1, 1000)  # documents at once
REPEATS = 5  # insertions of which the median is taken
QUERIES, ROUNDS = 15, 2
DOCID = DocidConfig(levels=8, codes=256)
NETWORK = ModelConfig(width=64, layers=2)
SEARCHES = {
    "one_pass": ("diffusion/rq", SearchOptions(k=10, decoder="one_pass")),
    "match": ("diffusion/rq", SearchOptions(k=10, decoder="match", steps=4)),
    "ar_beam": ("autoregressive/rq", SearchOptions(k=10, decoder="beam", beam=10)),
}


def run() -> dict[str, Any]:
    """What a process of this module measures."""
    command = [sys.executable, "-m", "benchmarks.growth_scale"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of each stage; ms of insertions and searches at each size."""
    stages = Stages()
    documents = _write(folder)
    stages.done("generate")
    data = load_retrieval(DataConfig(name="files", path=str(folder)), quiet=True)
    stages.done("load")
    near = {i for pair in near_pairs([d.text for d in data.documents], 0.8) for i in pair}
    stages.done("count near-duplicates")
    encoder = load_static("wordllama")
    embeddings = encoder.embed([body(document) for document in documents])
    stages.done("embed")
    fitted = embeddings[: len(data.documents)]
    space = fit_space(DOCID, data.documents, fitted, seed=0, encoder_hash=encoder.hash)
    stages.done("fit docids")
    table = DocidTable.build(space, documents[: SIZES[0]], embeddings[: SIZES[0]])
    growth = Growth(table, documents, embeddings, [query.text for query in data.queries["test"][:QUERIES]])
    for size in SIZES:
        growth.measure(size)
    stages.done("admit and search")
    return {
        "stages": stages.rows,
        "peak_gib": max(row["peak_gib"] for row in stages.rows.values()),
        "insertion_ms": growth.insertion_ms,
        "first_search_ms": growth.first_search_ms,
        "search_ms": growth.search_ms,
        "conditions": {
            "documents": len(data.documents),
            "with_a_near_duplicate": len(near),
            "levels": DOCID.levels,
            "codes": DOCID.codes,
            "dimensions": embeddings.shape[1],
            "queries": QUERIES,
            "threads": 1,
        },
    }


class Stages:
    """Seconds of each stage, and the process's peak memory at its end in GiB."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}
        self._started = time.perf_counter()

    def done(self, name: str) -> None:
        """The stage has ended and the next one begins."""
        now = time.perf_counter()
        # Not getrusage: its peak may be that of the process that started this one.
        peak = int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) / 2**20
        self.rows[name] = {"seconds": round(now - self._started, 1), "peak_gib": round(peak, 2)}
        self._started = now


@dataclass
class Growth:
    """A table that grows document by document of ``documents``, searched by every decoder after each insertion.

    ``insertion_ms`` is the time until a table and decoders over it stand, embeddings being given; ``first_search_ms``
    that of one search by each decoder then.
    """

    table: DocidTable
    documents: list[Document]
    embeddings: np.ndarray
    texts: list[str]
    insertion_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    first_search_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    search_ms: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arms = {name: parse(name) for name, _ in SEARCHES.values()}
        self.models = {name: (arm, build_model(NETWORK, arm, self.table).eval()) for name, arm in arms.items()}
        self.inputs = TokenInputs(load_static("wordllama"), NETWORK.query_len)
        self._move()

    def measure(self, size: int) -> None:
        """Grow to ``size`` documents; then time searches and insertions."""
        while len(self.table) < size:
            self._insert(min(INSERTED[-1], size - len(self.table)))
        for name in SEARCHES:
            ms = [self._search(name, text) for _ in range(ROUNDS) for text in self.texts]
            self.search_ms.setdefault(name, {})[str(size)] = round(float(np.median(ms)), 2)
        for count in INSERTED:
            insertion, first = np.median([self._insert(count) for _ in range(REPEATS)], axis=0)
            self.insertion_ms.setdefault(str(count), {})[str(size)] = round(float(insertion), 2)
            self.first_search_ms.setdefault(str(count), {})[str(size)] = round(float(first), 2)

    def _insert(self, count: int) -> tuple[float, float]:
        rows = slice(len(self.table), len(self.table) + count)
        started = time.perf_counter()
        self.table, _ = self.table.insert(self.documents[rows], self.embeddings[rows])
        self._move()
        inserted = 1000 * (time.perf_counter() - started)
        return inserted, sum(self._search(name, self.texts[0]) for name in SEARCHES)

    def _move(self) -> None:
        self.decoders = {name: arm.learner.decoder(model, self.table) for name, (arm, model) in self.models.items()}

    def _search(self, name: str, text: str) -> float:
        """Milliseconds from a text to its documents."""
        arm, options = SEARCHES[name]
        started = time.perf_counter()
        (result,) = self.decoders[arm].search(self.inputs.features([text]), [options])
        elapsed = 1000 * (time.perf_counter() - started)
        assert len(result.hits) == options.k
        return elapsed


def _write(folder: Path) -> list[Document]:
    """Write a corpus of the last size with queries for some documents; with it, those that arrive at last."""
    real = load_retrieval(DataConfig(), quiet=True).documents
    documents = list(itertools.islice(spliced(real), SIZES[-1] + REPEATS * sum(INSERTED)))
    documents.sort(key=lambda document: document.id)
    queries = [Query(f"q{i}", d.text[:80], (d.id,)) for i, d in enumerate(documents[: SIZES[-1] : 500])]
    export(RetrievalData("spliced", "", "", documents[: SIZES[-1]], {"test": queries}), folder)
    return documents


def spliced(known: list[Document]) -> Iterator[Document]:
    """An endless stream of documents, each made of one half of two known ones."""
    random = np.random.default_rng(0)
    number = 0
    while True:
        a, b = (known[i].text.split() for i in random.integers(len(known), size=2))
        text = " ".join(a[: len(a) // 2] + b[len(b) // 2 :])
        yield Document(f"synthetic-{number:06}", f"synthetic {' '.join(b[:4])}", text or "nothing")
        number += 1


if __name__ == "__main__":
    with one_thread(), tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(Path(directory))))
