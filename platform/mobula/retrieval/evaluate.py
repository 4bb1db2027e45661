"""Evaluating a DiffuGR run: every system on every test split, the claims, tables and plots of the report."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobula.data.records import Query
from mobula.data.views import body
from mobula.evaluation import ranking
from mobula.evaluation.claims import compare
from mobula.evaluation.intervals import mean_interval
from mobula.experiment import Claim, Report
from mobula.retrieval import claims
from mobula.retrieval.arms import Arm
from mobula.retrieval.config import Config
from mobula.retrieval.decoding.recovery import recovery
from mobula.retrieval.dense import Dense
from mobula.retrieval.docids.families import FAMILIES
from mobula.retrieval.docids.lookup import RANKERS, LookupRetriever
from mobula.retrieval.fitting import Fitted, docid_task, load_arm, load_dual
from mobula.retrieval.lexical import tune
from mobula.retrieval.outcomes import BATCH, Split, System, search_all, time_systems
from mobula.retrieval.prepare import Material, sample
from mobula.retrieval.retrievers import DocidRetriever, DualRetriever
from mobula.retrieval.search import Hit, SearchOptions, SearchResult
from mobula.threads import one_thread

log = logging.getLogger(__name__)
PROGRESS_S = 10.0
SEEN, UNSEEN = "gold document has training queries", "gold document has none"


def evaluate_run(config: Config, material: Material, fitted: Fitted, directory: Path, report: Report) -> None:
    """Fill ``report`` with measures, claims, tables, plots and notes; writes TREC run files under ``runs/``."""
    with one_thread():
        evaluation = Evaluation(config, material, fitted)
        for name, queries in material.data.queries.items():
            if name not in ("train", "dev"):
                kept = sample(queries, config.evaluation.max_queries, config.seed)
                evaluation.measure(evaluation.split(name, kept, directory / "runs" / name), timed=name == "test")
        evaluation.measure_recovery()
    evaluation.fill(report)


class Evaluation:
    """The systems of one run and what was measured of them."""

    def __init__(self, config: Config, material: Material, fitted: Fitted) -> None:
        self.config, self.material, self.fitted = config, material, fitted
        self.arms = config.parsed_arms
        self.main = self.arms[0]
        self.twin = next(
            (a for a in self.arms if a.paradigm == "autoregressive" and a.family == self.main.family), None
        )
        self.random = next((arm for arm in self.arms if arm == Arm("diffusion", "random")), None)
        self.splits: dict[str, Split] = {}
        self.recovered: dict[str, list[Any]] = {}
        documents, dev = material.data.documents, material.data.queries["dev"]
        self.bm25, self.bm25_grid = tune(documents, dev)
        self.models = {
            arm: [self._retriever(arm, seed) for seed in range(len(results))] for arm, results in fitted.arms.items()
        }
        self.systems = dict(self._systems())
        self.chosen = self._choose_on_dev()

    def split(self, name: str, queries: list[Query], directory: Path | None) -> Split:
        """A split to be measured."""
        resamples = self.config.evaluation.resamples
        split = Split(name, queries, len(self.material.data.documents), directory, resamples)
        self.splits[name] = split
        return split

    def measure(self, split: Split, *, timed: bool) -> None:
        """Run every system on a split; time them side by side where ``timed``."""
        log.info("evaluating on %s: %d queries", split.name, len(split.queries))
        for name, system in self._baselines().items():
            split.record(name, search_all(system.search, split.texts, system.options))
        split.record("popularity", self._popularity(len(split.queries)))
        for seed in range(self.config.evaluation.seeds):
            self._measure_models(split, seed)
        if timed:
            self._time(split)

    def measure_recovery(self) -> None:
        """Early-error recovery (spec 8) of the main arm with every remask rule, and of its twin."""
        split = self.splits["test"]
        features = self.models[self.main][0].features(split.texts)
        steps = max(1, self.models[self.main][0].levels)
        for rule in self.config.evaluation.remask:
            options = SearchOptions(decoder="match_rerank", steps=steps, remask=rule, k=10)
            self.recovered[f"{self.main} remask={rule}"] = [
                recovery(model.decoder, features, options, split.gold) for model in self.models[self.main]
            ]
        if self.twin is not None:
            options = SearchOptions(decoder="beam", beam=10, k=10)
            features = self.models[self.twin][0].features(split.texts)
            self.recovered[f"{self.twin} beam 10"] = [
                recovery(model.decoder, features, options, split.gold) for model in self.models[self.twin]
            ]

    def fill(self, report: Report) -> None:
        """Write everything into the report."""
        test = self.splits["test"]
        for name, split in self.splits.items():
            report.tables[f"{name}: {len(split.queries)} queries, {split.documents} documents"] = split.table()
            prefix = "" if name == "test" else f"{name}/"
            for system in split.outcomes:
                for measure in split.outcomes[system].values:
                    report.measures[f"{prefix}{system}/{measure}"] = split.measure(system, measure)
        report.claims.extend(self._claims(test))
        report.tables["By stratum"] = self._strata(test)
        report.tables["Early-error recovery"] = self._recovery_table()
        report.tables["Docids"] = self._docid_table()
        report.tables["Learning rates"] = [["arm", "rate", "dev value of its trial", "chosen"], *self.fitted.rates]
        report.plots.update(self._plots(test))
        report.notes.extend(self._notes(test))

    # Systems

    def _systems(self) -> Iterator[tuple[str, tuple[Arm, SearchOptions]]]:
        """Name -> (arm, options) of every docid system."""
        evaluation, depth = self.config.evaluation, self.config.evaluation.depth
        base = replace(self.config.decode, k=depth, steps=None, threshold=None)
        for arm in self.arms:
            if arm.paradigm == "autoregressive":
                yield from self._twin_systems(arm, base)
                continue
            yield f"{arm} one_pass", (arm, replace(base, decoder="one_pass"))
            if arm.paradigm == "diffusion" and arm != self.main:
                steps = self.models[arm][0].levels
                yield f"{arm} match_rerank T={steps}", (arm, replace(base, decoder="match_rerank", steps=steps))
        levels = self.models[self.main][0].levels
        for steps in self._steps():
            for decoder in evaluation.decoders:
                yield f"{self.main} {decoder} T={steps}", (self.main, replace(base, decoder=decoder, steps=steps))
        for tau in evaluation.thresholds:
            yield f"{self.main} match tau={tau:g}", (self.main, replace(base, decoder="match", threshold=tau))
        for order in evaluation.orders:
            if order != base.order:
                options = replace(base, decoder="match_rerank", steps=levels, order=order)
                yield f"{self.main} match_rerank T={levels} order={order}", (self.main, options)
        for decoder in ("beam", "best_of_n", "chain_rescore"):
            yield f"{self.main} {decoder}", (self.main, replace(base, decoder=decoder, steps=None))

    def _twin_systems(self, arm: Arm, base: SearchOptions) -> Iterator[tuple[str, tuple[Arm, SearchOptions]]]:
        yield f"{arm} greedy", (arm, replace(base, decoder="greedy"))
        for beam in self.config.evaluation.beams:
            yield f"{arm} beam {beam}", (arm, replace(base, decoder="beam", beam=beam))
        if len(self.material.data.documents) <= self.config.evaluation.exhaustive:
            yield f"{arm} exhaustive", (arm, replace(base, decoder="exhaustive"))

    def _steps(self) -> list[int]:
        levels = self.models[self.main][0].levels
        return sorted({min(steps, levels) for steps in self.config.evaluation.steps})

    def _baselines(self) -> dict[str, System]:
        options = SearchOptions(k=self.config.evaluation.depth)
        documents, encoder = self.material.data.documents, self.material.encoder
        searches: dict[str, Callable[..., list[SearchResult]]] = {"bm25": self.bm25.search}
        searches["dense"] = Dense(encoder, documents, self.material.embeddings).search
        if self.fitted.dual is not None:
            dual = load_dual(self.material.prepared, self.fitted.dual)
            ids = [document.id for document in documents]
            searches["dual"] = DualRetriever(dual, encoder, ids, self.material.embeddings).search
        table = self.material.prepared.table(self.main.family)
        if FAMILIES[self.main.family].is_quantised:
            searches |= {name: LookupRetriever(name, table, encoder, body).search for name in RANKERS}
        return {name: System(name, search, options) for name, search in searches.items()}

    def _retriever(self, arm: Arm, seed: int) -> DocidRetriever:
        task = docid_task(self.config, self.material.prepared, arm)
        model = load_arm(task, self.fitted.arms[arm][seed])
        inputs = self.material.inputs[self.config.model.reader(arm)]
        return DocidRetriever(str(arm), model, task.table, inputs, self.material.encoder)

    def _features(self, arms: Iterable[Arm], texts: list[str]) -> dict[str, dict[str, torch.Tensor]]:
        """What the networks of ``arms`` read of queries, by reader."""
        readers = {self.config.model.reader(arm): arm for arm in arms}
        return {reader: self.models[arm][0].features(texts) for reader, arm in readers.items()}

    def _popularity(self, queries: int) -> list[SearchResult]:
        """Documents by their number of training queries, the same for every query."""
        counts = Counter(gold for query in self.material.data.queries.get("train", []) for gold in query.gold)
        hits = [Hit(document.id, float(counts[document.id])) for document in self.material.data.documents]
        ranked = sorted(hits, key=lambda hit: -hit.score)[: self.config.evaluation.depth]
        return [SearchResult(list(ranked), scored_by="training queries") for _ in range(queries)]

    # Measuring

    def _measure_models(self, split: Split, seed: int) -> None:
        features = self._features(self.arms, split.texts)
        told = time.monotonic()
        for position, (name, (arm, options)) in enumerate(self.systems.items()):
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                log.info("%s, seed %d: %d of %d systems, now %s", split.name, seed, position, len(self.systems), name)
            read = features[self.config.model.reader(arm)]
            search = partial(_search_features, self.models[arm][seed], read, split.gold)
            width = options.beam if options.decoder in ("beam", "greedy") and arm.paradigm == "autoregressive" else None
            split.record(name, search(options), seed=seed, width=_width(options, width, split.documents))

    def _choose_on_dev(self) -> str:
        """The decoder of the main arm that is best on dev, among those that one request can ask for."""
        queries = sample(self.material.data.queries["dev"], self.config.evaluation.dev_queries, self.config.seed)
        dev = Split("dev", queries, len(self.material.data.documents), None, self.config.evaluation.resamples)
        model = self.models[self.main][0]
        features = model.features(dev.texts)
        for name, (arm, options) in self.systems.items():
            if arm == self.main:
                dev.record(name, _search_features(model, features, dev.gold, options))
        primary = self.config.evaluation.primary
        return max(dev.outcomes, key=lambda name: float(dev.outcomes[name].per_query(primary).mean()))

    def _time(self, split: Split) -> None:
        texts = split.texts[: self.config.evaluation.latency_queries]
        log.info("timing every system on %d queries, one by one", len(texts))
        systems = list(self._baselines().values())
        for name, (arm, options) in self.systems.items():
            if arm in (self.main, self.twin) and options.decoder != "exhaustive":
                systems.append(System(name, self.models[arm][0].search, options))
        for name, ms in time_systems(systems, texts).items():
            split.outcomes[name].ms = ms

    # Reporting

    def _claims(self, test: Split) -> Iterator[Claim]:
        evaluation, main, twin = self.config.evaluation, str(self.main), str(self.twin) if self.twin else None
        random = str(self.random) if self.random else None
        options = {"decisive": evaluation.decisive, "resamples": evaluation.resamples}
        rows = claims.comparisons(main, twin, random, self._steps(), self.chosen)
        yield from claims.quality_claims(test, rows, primary=evaluation.primary, **options)  # type: ignore[arg-type]
        found = [
            claims.threshold_claim(
                test,
                main,
                self._steps(),
                evaluation.thresholds,
                primary=evaluation.primary,
                **options,  # type: ignore[arg-type]
            )
        ]
        for beam in evaluation.beams if twin else ():
            statement = f"fewer sequential steps mean lower latency than the twin at depth {evaluation.depth}"
            ours, theirs = f"{main} match_rerank T={self._steps()[0]}", f"{twin} beam {beam}"
            found.append(claims.latency_claim(test, f"C-latency beam {beam}", ours, theirs, statement, **options))  # type: ignore[arg-type]
        found.extend(self._recovery_claims())
        yield from (claim for claim in found if claim is not None)

    def _recovery_claims(self) -> Iterator[Claim]:
        evaluation = self.config.evaluation
        twin = self.recovered.get(f"{self.twin} beam 10")
        if twin is None:
            return
        reference = np.array([found.top for found in twin], dtype=float)
        for name, found in self.recovered.items():
            if name.startswith(str(self.main)):
                yield compare(
                    f"D-recovery {name.rsplit('=')[-1]}",
                    f"any-order decoding survives an early error better than the twin ({name}, gold in the top 10)",
                    np.array([seed.top for seed in found], dtype=float),
                    reference,
                    decisive=evaluation.decisive,
                    resamples=evaluation.resamples,
                )

    def _strata(self, test: Split) -> list[list[Any]]:
        trained = {gold for query in self.material.data.queries.get("train", []) for gold in query.gold}
        seen = np.array([any(gold in trained for gold in query.gold) for query in test.queries])
        primary = self.config.evaluation.primary
        rows: list[list[Any]] = [["system", "stratum", "queries", primary, "low", "high"]]
        shown = ["bm25", "dense", "dual", "hamming", "adc", self.chosen, f"{self.main} one_pass"]
        shown += [f"{self.twin} beam 10", f"{self.random} one_pass"]
        for name in dict.fromkeys(name for name in shown if name in test.outcomes):
            for label, mask in ((SEEN, seen), (UNSEEN, ~seen)):
                if mask.any():
                    values = test.outcomes[name].per_query(primary)[:, mask]
                    found = mean_interval(values, resamples=self.config.evaluation.resamples)
                    rows.append([name, label, found.n, found.value, found.low, found.high])
        return rows

    def _recovery_table(self) -> list[list[Any]]:
        rows: list[list[Any]] = [["decoding", "final docid right %", "gold in top 10 %"]]
        for name, found in self.recovered.items():
            final, top = (100 * float(np.mean([getattr(f, part) for f in found])) for part in ("final", "top"))
            rows.append([name, round(final, 1), round(top, 1)])
        return rows

    def _docid_table(self) -> list[list[Any]]:
        rows: list[list[Any]] = [
            ["family", "levels", "codes", "collision %", "largest bucket", "entropy per level, bits"]
        ]
        for family in sorted({arm.family for arm in self.arms}):
            table = self.material.prepared.table(family)
            facts = table.report()
            entropy = " ".join(f"{value:.1f}" for value in facts["entropy"][:16])
            collisions = round(100 * facts["collision_rate"], 1)
            rows.append([family, table.levels, table.width, collisions, facts["largest_bucket"], entropy])
        return rows

    def _plots(self, test: Split) -> dict[str, dict[str, Any]]:
        primary, main = self.config.evaluation.primary, str(self.main)
        curves = {}
        for decoder in self.config.evaluation.decoders:
            points = [(t, test.measure(f"{main} {decoder} T={t}", primary).value) for t in self._steps()]
            curves[f"{main} {decoder}"] = points
        series: dict[str, list[tuple[float, float]]] = {}
        for name, outcome in test.outcomes.items():
            if len(outcome.ms) and primary in outcome.values:
                group = name.split(" ")[0]
                point = (float(np.median(outcome.ms)), float(outcome.per_query(primary).mean()))
                series.setdefault(group, []).append(point)
        budget = {"kind": "line", "x": "denoising steps T", "y": primary, "series": curves}
        pareto = {"kind": "pareto", "x": "p50 latency, ms", "y": primary, "series": series, "log_x": True}
        return {"budget": budget, "pareto": pareto}

    def _notes(self, test: Split) -> Iterator[str]:
        k1, b = self.bm25.k1, self.bm25.b
        yield f"BM25: k1={k1}, b={b}, chosen on dev"
        yield f"diffusion decoder chosen on dev: {self.chosen}"
        yield "diffugr-style (reconstruction): the paper gives neither code lengths nor rates; see the documentation"
        if self.twin is not None:
            depth = self.config.evaluation.depth
            for beam in self.config.evaluation.beams:
                note = ranking.width_note((str(self.main), f"{self.twin} beam {beam}"), (depth, beam))
                if note:
                    yield note


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


def _width(options: SearchOptions, width: int | None, documents: int) -> int | None:
    """Candidates a system really ranked; greedy has one."""
    if options.decoder == "greedy":
        return 1
    return None if width is None else min(width, documents)
