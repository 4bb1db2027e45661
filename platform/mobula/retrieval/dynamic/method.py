"""Generative retrieval over dynamic corpora (SIGIR 2025, arXiv 2504.17519; reconstruction).

Systems are trained once, on an initial set of documents; further sets arrive and are indexed without training. ``run``
evaluates every system while they arrive; ``load`` opens the artifact, grown to the last session, for serving.
"""

from __future__ import annotations

import logging

from mobula.cluster.pool import pool
from mobula.data import load_retrieval
from mobula.data.sessions import plan_sessions
from mobula.errors import ConfigError
from mobula.experiment import DataFacts, Report, Run
from mobula.retrieval.dynamic import artifact
from mobula.retrieval.dynamic.config import Config
from mobula.retrieval.dynamic.evaluate_sessions import measure_latency
from mobula.retrieval.dynamic.prepare import Sessions
from mobula.retrieval.dynamic.report import build_report
from mobula.retrieval.dynamic.results import Results
from mobula.retrieval.dynamic.study import SessionStudy
from mobula.retrieval.dynamic.trial import train_trial
from mobula.threads import one_thread

__all__ = ["Config", "load", "run", "train_trial"]
log = logging.getLogger(__name__)
load = artifact.load


def run(run: Run) -> Report:
    """Train on the initial documents, search every state of the corpus with every system, report."""
    config: Config = run.config  # type: ignore[assignment]
    problems = config.serving_problems()
    if problems:
        raise ConfigError(problems, config.name)
    data = load_retrieval(config.data)
    run.bind("data", data.sha256)
    plan = plan_sessions(data, config.sessions)
    plan.save(run.directory / "sessions.json")
    run.bind("sessions", plan.hash)
    sessions = Sessions.of(data, plan)
    study = SessionStudy(config, sessions, run.directory, run.cluster)
    with pool(config.parallel if config.parallel > 1 else 0, run.cluster) as workers:
        study.train_all(workers)
        trained = study.trained
        run.bind("encoder", trained.documents.encoder.hash)  # before results of another encoder are read
        evaluated = study.evaluate_all(workers)
    with one_thread():
        for system, ms in measure_latency(list(study.specs.values()), study.protocol).items():
            evaluated[system].ms = ms
    report = run.report()
    report.data.append(DataFacts(data.name, data.source, data.sha256, data.records))
    report.notes.extend(f"{name}: {value}" for name, value in {**data.notes, **plan.notes}.items())
    build_report(report, Results(config, study.protocol, evaluated), trained.rates)
    artifact.write(config, sessions, trained, run.artifact_directory)
    trainings = [result for seeds in trained.results.values() for result in seeds]
    report.cost["train_steps"] = sum(result.steps for result in trainings)
    report.cost["train_examples"] = sum(result.examples for result in trainings)
    report.cost["train_s"] = sum(result.seconds for result in trainings)
    return report
