"""Measuring a DiffuGR run: every system on every test split, timed side by side, and after forced early errors."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mobula.data.pseudo_queries import body
from mobula.data.records import Query
from mobula.experiment import Report
from mobula.retrieval.arms import Arm
from mobula.retrieval.claims import RECOVERY_BEAM
from mobula.retrieval.config import Config
from mobula.retrieval.decoding.recovery import Recovery, recovery
from mobula.retrieval.dense import Dense
from mobula.retrieval.diagnostics import Levels, flops, levels, model_bytes
from mobula.retrieval.docids.code_only import RANKERS, CodeOnlyRetriever
from mobula.retrieval.lexical import tune
from mobula.retrieval.prepare import Material, sample
from mobula.retrieval.report import Measured, fill
from mobula.retrieval.results import BATCH, Search, Split, Timed, search_all, time_batches, time_systems
from mobula.retrieval.retrievers import DocidRetriever, DualRetriever
from mobula.retrieval.search import Hit, SearchOptions, SearchResult
from mobula.retrieval.systems import Decoded, base_options, decoded, systems
from mobula.retrieval.train_arms import Fitted, docid_task, load_arm, load_dual
from mobula.study import System
from mobula.threads import one_thread

log = logging.getLogger(__name__)
PROGRESS_S = 10.0


def evaluate_run(config: Config, material: Material, fitted: Fitted, directory: Path, report: Report) -> None:
    """Fill ``report`` with measures, claims, tables, plots and notes; writes TREC run files under ``runs/``."""
    with one_thread():
        evaluation = Evaluation(config, material, fitted)
        splits = {}
        for name, queries in material.data.queries.items():
            if name not in ("train", "dev"):
                kept = sample(queries, config.evaluation.max_queries, config.seed)
                splits[name] = evaluation.measure(name, kept, directory / "runs" / name)
        evaluation.time(splits["test"])
        recovered = evaluation.recovery(splits["test"])
        diagnosed = evaluation.levels(splits["test"]), evaluation.sizes()
    parameters = (evaluation.bm25.k1, evaluation.bm25.b)
    measured = Measured(config, material, splits, evaluation.chosen, recovered, parameters, fitted.rates, *diagnosed)
    fill(report, measured)


class Evaluation:
    """The retrievers of one run: docid models by arm and seed, and baselines."""

    def __init__(self, config: Config, material: Material, fitted: Fitted) -> None:
        self.config, self.material, self.fitted = config, material, fitted
        self.bm25, _ = tune(material.data.documents, material.data.queries["dev"])
        self.baselines = self._baselines()
        self.models = {
            arm: [self._retriever(arm, seed) for seed in range(len(results))] for arm, results in fitted.arms.items()
        }
        self.systems = systems(config, len(material.data.documents))
        self.base = base_options(config)
        self.chosen = self._choose_on_dev()

    def measure(self, name: str, queries: list[Query], directory: Path | None) -> Split:
        """What every system does on a split."""
        log.info("evaluating on %s: %d queries", name, len(queries))
        split = self._split(name, queries, directory)
        options = SearchOptions(k=self.config.evaluation.depth)
        for system, search in self.baselines.items():
            split.record(system, search_all(search, split.texts, options))
        split.record(System("popularity"), self._popularity(len(split.queries)))
        for seed in range(self.config.evaluation.seeds):
            self._measure_models(split, seed)
        return split

    def time(self, split: Split) -> None:
        """Time baselines, the main arm and its twin side by side."""
        texts = split.texts[: self.config.evaluation.latency_queries]
        log.info("timing every system on %d queries, one by one", len(texts))
        options = SearchOptions(k=self.config.evaluation.depth)
        timed = [Timed(system, search, options) for system, search in self.baselines.items()]
        for system, arm in self.systems.items():
            decoding = system.search_options(self.base)
            if arm in (self.config.main, self.config.twin) and decoding.decoder != "exhaustive":
                timed.append(Timed(system, self.models[arm][0].search, decoding))
        for measured, ms in time_systems(timed, texts).items():
            split.outcome(measured).ms = ms
        for measured, batch_ms in time_batches(timed, texts).items():
            split.outcome(measured).batch_ms = batch_ms

    def levels(self, split: Split) -> dict[Arm, list[Levels]]:
        """Likelihood and accuracy of the gold docids, by arm, one a seed."""
        features, seed = self._features(split.texts), self.config.seed
        read = {arm: features[self.config.model.reader(arm)] for arm in self.models}
        return {
            arm: [levels(model.decoder, read[arm], split.gold, seed) for model in models]
            for arm, models in self.models.items()
        }

    def sizes(self) -> dict[str, dict[str, int]]:
        """Bytes of weights and index of every retriever."""
        sizes = {str(arm): model_bytes(models[0].decoder) for arm, models in self.models.items()}
        flat = {"weights": 0, "index": self.material.embeddings.nbytes}
        return {"bm25": {"weights": 0, "index": self.bm25.index_bytes}, "dense": flat, **sizes}

    def recovery(self, split: Split) -> dict[Decoded, list[Recovery]]:
        """Early-error recovery (spec 8) of the main arm with every remask rule, and of its twin, one a seed."""
        main, twin = self.config.main, self.config.twin
        recovered = {}
        for rule in self.config.evaluation.remask:
            options = SearchOptions(decoder="match_rerank", steps=self.models[main][0].levels, remask=rule, k=10)
            recovered[decoded(main, remask=rule)] = self._recovered(main, split, options)
        if twin is not None:
            options = SearchOptions(decoder="beam", beam=RECOVERY_BEAM, k=10)
            recovered[decoded(twin, decoder="beam", beam=RECOVERY_BEAM)] = self._recovered(twin, split, options)
        return recovered

    def _recovered(self, arm: Arm, split: Split, options: SearchOptions) -> list[Recovery]:
        features = self.models[arm][0].features(split.texts)
        return [recovery(model.decoder, features, options, split.gold) for model in self.models[arm]]

    def _split(self, name: str, queries: list[Query], directory: Path | None) -> Split:
        return Split(name, queries, len(self.material.data.documents), directory, self.config.evaluation.resamples)

    def _baselines(self) -> dict[System, Search]:
        documents, encoder = self.material.data.documents, self.material.encoder
        searches: dict[str, Callable[..., list[SearchResult]]] = {"bm25": self.bm25.search}
        searches["dense"] = Dense(encoder, documents, self.material.embeddings).search
        if self.fitted.dual is not None:
            dual = load_dual(self.material.prepared, self.fitted.dual)
            ids = [document.id for document in documents]
            searches["dual"] = DualRetriever(dual, encoder, ids, self.material.embeddings).search
        if self.config.main.docids.is_quantised:
            table = self.material.prepared.table(self.config.main.family)
            searches |= {name: CodeOnlyRetriever(name, table, encoder, body).search for name in RANKERS}
        return {System(name): search for name, search in searches.items()}

    def _retriever(self, arm: Arm, seed: int) -> DocidRetriever:
        task = docid_task(self.config, self.material.prepared, arm)
        model = load_arm(task, self.fitted.arms[arm][seed])
        inputs = self.material.inputs[self.config.model.reader(arm)]
        return DocidRetriever(str(arm), model, task.table, inputs, self.material.encoder)

    def _popularity(self, queries: int) -> list[SearchResult]:
        """Documents by their number of training queries, the same for every query."""
        counts = Counter(gold for query in self.material.data.queries.get("train", []) for gold in query.gold)
        hits = [Hit(document.id, float(counts[document.id])) for document in self.material.data.documents]
        ranked = sorted(hits, key=lambda hit: -hit.score)[: self.config.evaluation.depth]
        return [SearchResult(list(ranked), scored_by="training queries") for _ in range(queries)]

    def _measure_models(self, split: Split, seed: int) -> None:
        features = self._features(split.texts)
        logged = time.monotonic()
        for position, (system, arm) in enumerate(self.systems.items()):
            if time.monotonic() - logged > PROGRESS_S:
                logged = time.monotonic()
                at, count = position, len(self.systems)
                log.info("%s, seed %d: %d of %d systems, now %s", split.name, seed, at, count, system.label)
            options = system.search_options(self.base)
            read = features[self.config.model.reader(arm)]
            model = self.models[arm][seed]
            results = _search_features(model, read, split.gold, options)
            split.record(system, results, seed=seed, width=_width(arm, options, split.documents), table=model.table)
            cost = flops(model.model, float(np.mean([result.rows for result in results])))
            if cost is not None:
                split.outcome(system).facts.setdefault("mflops", []).append(cost / 1e6)

    def _features(self, texts: list[str]) -> dict[str, dict[str, torch.Tensor]]:
        """What the networks of the arms read of queries, by reader."""
        readers = {self.config.model.reader(arm): arm for arm in self.config.parsed_arms}
        return {reader: self.models[arm][0].features(texts) for reader, arm in readers.items()}

    def _choose_on_dev(self) -> Decoded:
        """The decoding of the main arm that is best on dev, among those that one request can ask for."""
        queries = sample(self.material.data.queries["dev"], self.config.evaluation.dev_queries, self.config.seed)
        dev = self._split("dev", queries, None)
        model = self.models[self.config.main][0]
        features = model.features(dev.texts)
        tried = [system for system, arm in self.systems.items() if arm == self.config.main]
        for system in tried:
            dev.record(system, _search_features(model, features, dev.gold, system.search_options(self.base)))
        primary = self.config.evaluation.primary
        return max(tried, key=lambda system: float(dev.outcome(system).per_query(primary).mean()))


def _search_features(
    model: DocidRetriever, features: dict[str, torch.Tensor], gold: Sequence[set[str]], options: SearchOptions
) -> list[SearchResult]:
    """Search with features that were computed once for all systems."""
    results: list[SearchResult] = []
    for start in range(0, len(gold), BATCH):
        batch = {name: values[start : start + BATCH] for name, values in features.items()}
        relevant = list(gold[start : start + BATCH])
        results.extend(model.decoder.search(batch, [options] * len(relevant), relevant))
    return results


def _width(arm: Arm, options: SearchOptions, documents: int) -> int | None:
    """Candidates a system really ranked, where it is not all documents; greedy has one."""
    if not arm.learner.causal or options.decoder == "exhaustive":
        return None
    return 1 if options.decoder == "greedy" else min(options.beam, documents)
