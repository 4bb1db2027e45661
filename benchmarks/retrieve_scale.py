"""A million passages, from a file of JSON lines to four actors that search them: time of each stage, and memory.

``python -m benchmarks.retrieve_scale 50000`` measures with fewer. Passages are random words, frequent ones short and
rare ones long, as many different ones as large corpora have. The index is hybrid: BM25, and vectors of static word
embeddings (wordllama) in an inverted file.

Memory is that of the four actors at once, all that they have imported included. Added up, their resident sets (RSS)
count a page that several map several times; proportional set sizes (PSS) count it once, which is what the machine
needs: PSS is compared with the limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobula import environment

PASSAGES = 1_000_000
ACTORS, BUILDERS = 4, 2
BATCH, BATCHES, K = 512, 2, 10
LIMIT_GIB = 4
ENCODER = "wordllama"
WORDS = 400_000
LENGTHS = (60, 121)  # words of a passage
BLOCK = 1000  # passages that share a seed
SYLLABLES = [f"{consonant}{vowel}" for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
TIMEOUT_S = 3600


def run() -> dict[str, Any]:
    """What a process of this module measures, whose classes travel to actors by value."""
    command = [sys.executable, "-m", "benchmarks.retrieve_scale", str(PASSAGES)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(passages: int) -> dict[str, Any]:
    """Seconds of each stage and batch, bytes of the index, and memory of the actors."""
    from mobula.cluster.connect import connect

    with tempfile.TemporaryDirectory(prefix="scale") as name:
        folder, stages = Path(name), Stages()
        write_corpus(folder / "corpus.jsonl", passages)
        stages.done("write")
        with connect(cpus=ACTORS):
            stages.done("start Ray")
            manifest = _build(folder)
            stages.done("build")
            rows = _search(folder)
            stages.done("open and search")
    seconds = sorted(second for row in rows for second in row["seconds"])
    memory = {when: _total([row[when] for row in rows]) for when in ("before", "after")}
    return {
        "name": "retrieve_scale",
        "stages_s": stages.seconds,
        "index_bytes": _by_folder(manifest.files),
        "batch_s": {"median": round(float(np.median(seconds)), 2), "most": round(seconds[-1], 2), "limit": 300},
        "memory": memory,
        "fits": memory["after"]["pss_gib"] < LIMIT_GIB,
        "conditions": {
            "passages": passages,
            "terms": manifest.bm25["terms"] if manifest.bm25 else 0,
            "dense": manifest.dense,
            "actors": ACTORS,
            "builders": BUILDERS,
            "batches": f"{BATCHES} of {BATCH} queries for each actor, k={K}, none asked twice",
            "limit_gib": LIMIT_GIB,
        },
    }


class Stages:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def done(self, name: str) -> None:
        """The stage has ended and the next one begins."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._started, 1)
        self._started = now


def write_corpus(file: Path, passages: int) -> None:
    """A corpus that depends on the number of passages alone."""
    with file.open("w", encoding="utf-8") as stream:
        for number, text in enumerate(texts("passages", passages, LENGTHS)):
            row = {"id": f"p{number}", "title": f"passage {number}", "text": text}
            stream.write(json.dumps(row) + "\n")


def texts(what: str, count: int, lengths: tuple[int, int]) -> Iterator[str]:
    """Random texts of so many words; the word of rank r has probability proportional to 1/r."""
    for start in range(0, count, BLOCK):
        rng = np.random.default_rng([*what.encode(), start])
        sizes = rng.integers(*lengths, size=BLOCK)
        ranks = np.exp(rng.random(sizes.sum()) * np.log(WORDS)).astype(np.int64)
        for part in np.split(ranks, np.cumsum(sizes)[:-1])[: count - start]:
            yield " ".join(map(_word, part.tolist()))


def _word(rank: int) -> str:
    letters = []
    while rank:
        rank, syllable = divmod(rank, len(SYLLABLES))
        letters.append(SYLLABLES[syllable])
    return "".join(letters)


def _build(folder: Path) -> Any:
    from mobula.cluster.pool import pool
    from mobula.rag.stored_search import build
    from mobula.retrieval.build_index import BuildOptions

    with pool(BUILDERS, None) as workers:
        options = BuildOptions("hybrid", ENCODER, "ivf")
        return build(folder / "corpus.jsonl", folder / "index", options, workers)


def _search(folder: Path) -> list[dict[str, Any]]:
    from mobula.cluster.pool import pool

    with pool(ACTORS, None) as workers:
        shards = [(number, [{"number": number}], 0) for number in range(ACTORS)]
        return [row for _, rows in workers.process(SearchWorker(folder), shards) for row in rows]


@dataclass
class SearchWorker:
    """Searches batches of queries in the index of a folder; memory before it is opened and after, as all others."""

    folder: Path

    def process(self, items: Sequence[dict[str, Any]], seed: int) -> Sequence[dict[str, Any]]:
        """As :class:`mobula.cluster.pool.Worker`, of one actor."""
        from mobula.rag.search import encoder_of
        from mobula.rag.stored_search import open_index

        number, seconds = items[0]["number"], []
        encoder_of(ENCODER).embed(["a text"])
        before = self._together("before", number)
        searcher = open_index(self.folder / "index", "hybrid", ENCODER)
        queries = list(texts(f"queries {number}", BATCH * BATCHES, (4, 13)))
        for start in range(0, len(queries), BATCH):
            began = time.perf_counter()
            searcher.search(queries[start : start + BATCH], K)
            seconds.append(time.perf_counter() - began)
        return [{"seconds": seconds, "before": before, "after": self._together("after", number)}]

    def _together(self, when: str, number: int) -> dict[str, int]:
        """The memory of this actor while all others are as far."""
        self._wait(f"{when}-reached", number)
        measured = memory()
        self._wait(f"{when}-measured", number)
        return measured

    def _wait(self, mark: str, number: int) -> None:
        (self.folder / f"{mark}-{number}").touch()
        until = time.monotonic() + TIMEOUT_S
        while len(list(self.folder.glob(f"{mark}-*"))) < ACTORS:
            if time.monotonic() > until:
                raise TimeoutError(f"{mark}: not all {ACTORS} actors came within {TIMEOUT_S} s")
            time.sleep(0.2)


def memory() -> dict[str, int]:
    """Bytes of this process: resident (rss), proportional (pss), and of no file (anonymous)."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    sizes = {line.split(":")[0].lower(): int(line.split()[1]) * 1024 for line in lines}
    return {name: sizes[name] for name in ("rss", "pss", "anonymous")}


def _total(parts: Sequence[dict[str, int]]) -> dict[str, float]:
    return {f"{name}_gib": round(sum(part[name] for part in parts) / 2**30, 3) for name in parts[0]}


def _by_folder(files: dict[str, dict[str, Any]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, facts in files.items():
        folder = name.split("/")[0]
        sizes[folder] = sizes.get(folder, 0) + facts["bytes"]
    return sizes


if __name__ == "__main__":
    environment.driver_environment()
    print(json.dumps(measure(int(sys.argv[1]))))
