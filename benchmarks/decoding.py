"""Latency of DiffuGR against its autoregressive twin, and of one-pass scoring over 16,000 documents.

Both paradigms are trained here, on the same examples for the same number of steps, as small networks over the
function documents: long enough that decoding ranks sensibly, not long enough to judge quality. A latency is that of
the whole way from a query's text to its documents, one query at a time, one thread. The systems take turns on every
query, and ratios are medians over the queries' pairs.

Returned depth is equal in every pair: 10 documents against a beam of 10, 100 against a beam of 100 (the beams keep
keys and values). The denoising budget is chosen on dev in two ways: the best Hit@10, and the cheapest whose Hit@10 is
not below the twin's.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import ratio
from mobula import config as configs
from mobula.data import load_retrieval
from mobula.data.records import Query
from mobula.retrieval.config import Config
from mobula.retrieval.decoding.corpus import Corpus, top
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.prepare import Material, prepare, sample
from mobula.retrieval.results import Outcome, Split, Timed, search_all, time_systems
from mobula.retrieval.retrievers import DocidRetriever
from mobula.retrieval.search import SearchOptions
from mobula.retrieval.train_arms import docid_task, load_arm, settings_for
from mobula.study import System
from mobula.threads import one_thread
from mobula.training import fit

CONFIG: dict[str, Any] = {
    "method": "diffugr",
    "name": "decoding",
    "arms": ["diffusion/rq", "autoregressive/rq"],
    "data": {"name": "functions", "max_documents": 1000, "keep": "relevant"},
    "docid": {"levels": 8, "codes": 32},
    "model": {"width": 64, "layers": 2},
    "pseudo_queries": {"per_document": 20, "real_share": 0.3},
    "training": {"examples": 60_000, "batch": 128, "workers": 0},
}
RATE = 4e-3
DEPTHS = (10, 100)
BUDGETS = (1, 2, 4, 8)
DEV_QUERIES, TIMED_QUERIES = 200, 60
LARGE = 16_000
RESAMPLES = 2000


def run() -> dict[str, Any]:
    """Ratios of latency, twin over diffusion; quality on test, cost and latency of every system; one pass at 16,000."""
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        config = configs.build(Config, CONFIG)
        data = load_retrieval(config.data, quiet=True)
        material = prepare(config, data, Path(folder) / "prepared")
        diffusion, twin = (_trained(config, material, index, Path(folder)) for index in range(2))
    dev = sample(data.queries["dev"], DEV_QUERIES, config.seed)
    texts = [query.text for query in sample(data.queries["test"], TIMED_QUERIES, config.seed)]
    result: dict[str, Any] = {"name": "decoding", "ratios": {}, "arms": {}, "chosen_on_dev": {}}
    with one_thread():
        for depth in DEPTHS:
            _compare(diffusion, twin, depth, {"dev": dev, "test": data.queries["test"]}, texts, result)
        result["one_pass_16000_ms"] = _one_pass(diffusion, texts)
    result["conditions"] = {
        "documents": len(data.documents),
        "test_queries": len(data.queries["test"]),
        "timed_queries": len(texts),
        "levels": diffusion.levels,
        "codes": config.docid.codes,
        "training_examples": config.training.examples,
        "threads": 1,
        "one_pass_16000": f"{len(data.documents)} real codes, the others drawn at random",
    }
    return result


def _trained(config: Config, material: Material, index: int, folder: Path) -> DocidRetriever:
    arm = config.parsed_arms[index]
    task = docid_task(config, material.prepared, arm)
    settings = settings_for(config.training, RATE)
    found = fit(task, settings, folder / arm.directory, seed=config.seed, name=str(arm))
    model, inputs = load_arm(task, found), material.inputs[config.model.reader(arm)]
    return DocidRetriever(str(arm), model, task.table, inputs, material.encoder)


def _systems(diffusion: DocidRetriever, depth: int) -> Iterator[Timed[str]]:
    """Diffusion's systems of a depth, cheapest first: one pass is one call, a budget of T steps T and one more."""
    options = SearchOptions(k=depth, pool=max(depth, 100))
    yield Timed(f"one_pass k={depth}", diffusion.search, replace(options, decoder="one_pass"))
    for steps in BUDGETS:
        for decoder in ("match", "match_rerank"):
            name = f"{decoder} T={steps} k={depth}"
            yield Timed(name, diffusion.search, replace(options, decoder=decoder, steps=steps))


def _compare(
    diffusion: DocidRetriever,
    twin: DocidRetriever,
    depth: int,
    splits: dict[str, list[Query]],
    texts: Sequence[str],
    result: dict[str, Any],
) -> None:
    """Choose on dev, measure the chosen systems on test, and time them against the twin at the same depth."""
    beam = Timed(f"ar beam {depth}", twin.search, SearchOptions(k=depth, decoder="beam", beam=depth))
    systems = list(_systems(diffusion, depth))
    documents = len(diffusion.table)
    dev = _measured("dev", splits["dev"], [beam, *systems], documents)
    hits = {name: _hit(outcome) for name, outcome in dev.items()}
    best = max(systems, key=lambda system: hits[system.key])
    equal = next((system for system in systems if hits[system.key] >= hits[beam.key]), None)
    chosen = {"best": best, **({"equal": equal} if equal else {})}
    timed = list({system.key: system for system in (beam, *chosen.values())}.values())
    test = _measured("test", splits["test"], timed, documents)
    ms = time_systems(timed, texts)
    prefix = "ar" if depth == DEPTHS[0] else f"ar{depth}"
    for choice, system in chosen.items():
        suffix = "" if choice == "best" else "_at_equal_hit10"
        result["ratios"][f"{prefix}_over_diffusion_latency{suffix}"] = ratio(
            ms[beam.key].tolist(), ms[system.key].tolist()
        )
    for system in timed:
        result["arms"][system.key] = _row(test[system.key], ms[system.key], hits[system.key])
    result["chosen_on_dev"][f"k={depth}"] = {
        "twin": beam.key,
        "best": best.key,
        "cheapest_not_below_the_twin": equal.key if equal else "none",
        "dev_hit10": {name: round(value, 4) for name, value in hits.items()},
    }


def _measured(name: str, queries: list[Query], systems: Sequence[Timed[str]], documents: int) -> dict[str, Outcome]:
    split = Split(name, queries, documents, None, RESAMPLES)
    for system in systems:
        found = search_all(system.search, split.texts, system.options)
        width = system.options.beam if system.options.decoder == "beam" else None
        split.record(System(system.key), found, width=width)
    return {system.key: split.outcome(System(system.key)) for system in systems}


def _hit(outcome: Outcome) -> float:
    return float(outcome.per_query("Hit@10").mean())


def _row(test: Outcome, ms: np.ndarray, dev_hit: float) -> dict[str, Any]:
    return {
        "hit10": round(_hit(test), 4),
        "dev_hit10": round(dev_hit, 4),
        "p50_ms": round(float(np.median(ms)), 3),
        "nfe": test.fact("nfe"),
        "rows": test.fact("rows"),
    }


def _one_pass(diffusion: DocidRetriever, texts: Sequence[str]) -> dict[str, float]:
    """Latency of one-pass search over the real codes and random ones, 16,000 together, and over the real ones alone.

    ``scoring``: the part that grows with the corpus, from one table of log-probabilities to the 10 best documents.
    """
    table = diffusion.table
    rng = np.random.default_rng(0)
    more = LARGE - len(table)
    codes = np.concatenate([table.codes, rng.integers(0, table.sizes, (more, table.levels), dtype=np.int32)])
    ids = [*table.doc_ids, *(f"random-{i}" for i in range(more))]
    large = DocidTable(table.space, codes, ids, np.ones(LARGE, bool), table.sizes)
    crowd = DocidRetriever(diffusion.name, diffusion.model, large, diffusion.inputs, diffusion.encoder)
    options = SearchOptions(k=10, decoder="one_pass")
    systems = [Timed("large", crowd.search, options), Timed("small", diffusion.search, options)]
    ms = time_systems(systems, texts)
    p50, p95 = np.percentile(ms["large"], [50, 95])
    return {
        "p50": round(float(p50), 3),
        "p95": round(float(p95), 3),
        "scoring_p50": round(_scoring_ms(large), 3),
        "same_over_the_real_corpus_alone_p50": round(float(np.median(ms["small"])), 3),
    }


def _scoring_ms(table: DocidTable) -> float:
    """Median time of ranking every document by a table of log-probabilities."""
    corpus, rng = Corpus.of(table), np.random.default_rng(0)
    times = []
    for _ in range(TIMED_QUERIES):
        log_probs = np.log(rng.dirichlet(np.ones(table.width), table.levels))
        started = time.perf_counter()
        top(corpus.scores(log_probs), 10)
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times))


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
