"""DiffuGR (arXiv 2511.08150; reconstruction): generative document retrieval by masked diffusion over docids.

``run`` trains the arms of an experiment beside their baselines and reports; ``load`` opens the artifact for
serving; ``measure`` and ``train_trial`` are what sweeps call. The mathematics is in :mod:`.paradigms`
(corruption, losses), :mod:`.network` and :mod:`.decoding`; the spec's sections are named where they matter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mobula import artifacts
from mobula.artifacts import Artifact
from mobula.config import digest
from mobula.data import load_retrieval
from mobula.data.records import RetrievalData
from mobula.errors import ConfigError
from mobula.experiment import DataFacts, Report, Run
from mobula.retrieval.artifact import cached, facts, fill, load
from mobula.retrieval.build import base_hash
from mobula.retrieval.config import Config
from mobula.retrieval.evaluate import evaluate_run
from mobula.retrieval.paradigms import MaskedDiffusion
from mobula.retrieval.prepare import Material, prepare, sample, title_leaks
from mobula.retrieval.results import Split, Timed, time_systems
from mobula.retrieval.train_arms import docid_task, fit_arms, settings_for
from mobula.study import System
from mobula.training import fit

__all__ = ["Config", "load", "measure", "run", "train_trial"]
log = logging.getLogger(__name__)
KIND = "retriever"


def run(run: Run) -> Report:
    """Train and evaluate; leaves checkpoints, run files and the artifact in the run's directory."""
    config: Config = run.config  # type: ignore[assignment]
    problems = config.evaluation_problems()
    if config.main.paradigm != MaskedDiffusion.name:
        problems.append(f"arms: the first arm is the main one and must be diffusion, found {config.arms[0]}")
    if problems:
        raise ConfigError(problems, config.name)
    data = load_retrieval(config.data)
    run.bind("data", data.sha256)
    material = prepare(config, data, run.directory / "prepared")
    run.bind("encoder", material.encoder.hash)
    run.bind("base", base_hash(config.model))
    leaks = title_leaks(material, config.parsed_arms)
    fitted = fit_arms(config, material.prepared, run.directory / "models", run.cluster)
    for result in fitted.results:
        run.log(weights=str(result.weights.relative_to(run.directory)), steps=result.steps, **result.best)
    report = run.report()
    report.data.append(DataFacts(data.name, data.source, data.sha256, data.records))
    report.notes.extend(f"{name}: {value}" for name, value in data.notes.items())
    for family, share in leaks.items():
        report.notes.append(f"test queries that contain the docid of a gold document ({family}): {share:.1%}")
    evaluate_run(config, material, fitted, run.directory, report)
    report.cost["train_steps"] = sum(result.steps for result in fitted.results)
    report.cost["train_examples"] = sum(result.examples for result in fitted.results)
    report.cost["train_s"] = sum(result.seconds for result in fitted.results)
    write_artifact(config, material, fitted, run.artifact_directory)
    return report


def write_artifact(config: Config, material: Material, fitted: Any, directory: Path) -> Artifact:
    """The servable artifact: documents, docid tables, every arm's first seed, dev queries for sweeps."""
    return artifacts.write(
        directory,
        kind=KIND,
        method="diffugr",
        meta=facts(config, material),
        fill=lambda folder: fill(folder, config, material, fitted),
    )


def measure(artifact: Artifact, config: Config, split: str = "dev") -> dict[str, float]:
    """Quality and latency of the main arm under ``config.decode`` on the artifact's dev queries (for sweeps).

    Returns ``hit@1``, ``hit@10``, ``mrr@10``, ``nfe``, ``steps``, ``p50_ms``, ``p95_ms``.
    """
    opened = cached(artifact)
    queries = sample(opened.queries[split], config.evaluation.dev_queries, config.seed)
    retriever = opened.retrievers[opened.default]
    options = replace(config.decode, k=config.evaluation.depth)
    measured = Split(split, queries, len(opened.documents), None, config.evaluation.resamples)
    decoded = System("decoded")
    measured.record(decoded, retriever.search([q.text for q in queries], [options] * len(queries)))
    timed = [q.text for q in queries[: config.evaluation.latency_queries]]
    ms = time_systems([Timed(decoded, retriever.search, config.decode)], timed)[decoded]
    outcome = measured.outcome(decoded)
    quality = {
        name: float(outcome.per_query(measure).mean())
        for name, measure in {"hit@1": "Hit@1", "hit@10": "Hit@10", "mrr@10": "MRR@10"}.items()
    }
    cost = {"nfe": outcome.fact("nfe") or 0.0, "steps": outcome.fact("steps") or 0.0}
    return {**quality, **cost, "p50_ms": float(np.median(ms)), "p95_ms": float(np.percentile(ms, 95))}


def train_trial(config: Config, directory: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """Train the first arm alone at the rate ``training.lr`` (for training sweeps).

    Reports {step, hit@1, hit@10, distinct_top1} after each evaluation on dev.
    """
    data: RetrievalData = load_retrieval(config.data, quiet=True)
    arm = config.main
    alone = replace(config, arms=[str(arm)])
    # Trials that differ in training alone share what was prepared.
    decides = [asdict(part) for part in (config.docid, config.model, config.pseudo_queries)]
    shared = digest([data.sha256, arm.family, *decides, config.evaluation.dev_queries, config.seed])
    material = prepare(alone, data, directory.parent / "prepared" / shared[:16])

    def progress(row: dict[str, Any]) -> None:
        if "dev" in row:
            report({"step": row["step"], **row["dev"]})

    task = docid_task(alone, material.prepared, arm)
    settings = settings_for(config.training, config.training.lr)
    result = fit(task, settings, directory / "fit", seed=config.seed, name=str(arm), progress=progress)
    log.info("trial done: best on dev %s", result.best)
