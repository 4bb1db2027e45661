"""The report of an `exsearch` run: what the study says of every method, curves by iteration, and the paper's claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mobula.errors import DataError, MobulaError
from mobula.evaluation import tables
from mobula.evaluation.claims import always, holm
from mobula.experiment import Claim, Report
from mobula.rag.exsearch.config import STEPS, WARM_UP, Config
from mobula.rag.exsearch.measures import SEARCHES, SHARES
from mobula.study import Results, System

BY_ITERATION = {
    "Dev questions by iteration, mean of seeds": (
        "dev_em", "dev_f1", "dev_last_gold_hit", "dev_searches", "dev_malformed", "dev_iwae_bound", "dev_sample_em",
    ),
    "E-step by iteration, mean of seeds": (
        "iwae_bound", "q_gain", "sample_em", "sample_in_facts", "ess", "largest", "all_fail", "skipped",
        "distinct_fraction", "variance", "sample_mean_nll", "sampler_kl",
    ),
}  # fmt: skip
PLOTTED = {
    "dev_em": "exact match, dev",
    "dev_f1": "F1, dev",
    "dev_iwae_bound": "IWAE bound of dev questions, nats",
}
PERMUTED = 0.02  # exact match that may be lost where passages are permuted
CLOSED_BOOK = 0.05  # exact match that nobody may exceed without searching


def build_report(
    report: Report, results: Results, bounds: tuple[np.ndarray, np.ndarray], harness: Mapping[System, str]
) -> None:
    """Measures, tables, plots and claims.

    ``bounds`` f[S, Q], twice: the IWAE bound of dev questions before the first iteration and at the best one.
    ``harness``: by system, what all of them must share.
    """
    config = config_of(results)
    report.notes.append(_header(config))
    report.notes.append(f"test questions: {len(results.runs(results.first)[0])}")
    report.notes.append(f"every arm has the backbone, retriever, limits and data {shared(harness)}")
    report.notes.extend(warnings(config, results.curves))
    results.report(report, SHARES, PLOTTED, examples="Test questions")
    for system in results.rows:
        for metric in SEARCHES:
            measure = results.measure(system, metric)
            if measure is not None:
                report.measures[f"{system.label}/{metric}"] = measure
    by_label = {system.label: runs for system, runs in results.rows.items()}
    report.tables["Searches and what went wrong, test"] = tables.means(by_label, SEARCHES)
    for title, columns in BY_ITERATION.items():
        report.tables[title] = tables.iterations(results.curves, columns)
    report.plots["bounds"] = _bounds_plot(results)
    report.claims.extend(claims_of(results, bounds))
    report.cost["seconds_per_question"] = float(np.mean([row["seconds"] for row in results.runs(results.first)[0]]))


def config_of(results: Results) -> Config:
    """The config of an `exsearch` study."""
    assert isinstance(results.config, Config)
    return results.config


def shared(harness: Mapping[System, str]) -> str:
    """What every system has.

    Raises:
        MobulaError: if one has another: the comparison would not be of arms.
    """
    names = set(harness.values())
    if len(names) > 1:
        by_label = {system.label: name for system, name in harness.items()}
        raise MobulaError(f"arms differ in backbone, retriever, limits or data: {by_label}")
    return names.pop()


def require_search(results: Results) -> None:
    """Check that questions of the world are not parametric knowledge: few are answered without searching.

    Raises:
        DataError: otherwise: what searching adds would prove nothing.
    """
    config = config_of(results)
    if not results.has("closed_book") or config.data.source != "world" or not config.evaluation.decisive:
        return
    exact = float(results.values("closed_book", "em").mean())
    if exact > CLOSED_BOOK:
        raise DataError(
            f"data: closed_book answers {exact:.2f} of the test questions without searching (at most {CLOSED_BOOK}); "
            "use other data.seed or more data.people, data.firms and data.books"
        )


def _header(config: Config) -> str:
    if config.model.base:
        model = f"{config.model.base}, {config.model.tuning}"
        return f"{model}; not the paper's models and benchmarks, whose figures are quoted"
    return (
        "an agent of about 0.13 M parameters in a generated world; not the paper's 7B models and benchmarks, whose "
        "figures are quoted, not reproduced"
    )


def warnings(config: Config, curves: Mapping[str, tables.Runs]) -> Iterator[str]:
    """Weights that say little, and curves that part."""
    em = config.em
    if config.rollout.heuristic and em.weights.correction == "none":
        yield "heuristic weights: trajectories are drawn at another temperature or nucleus than the model's own"
    if em.samples == 1 and em.weights.rule == "snis":
        yield "no signal: one sample has weight 1 whatever its likelihood"
    for name, runs in curves.items():
        for seed, run in enumerate(runs, config.seed):
            if len(run) < 3:
                continue
            first, last = run[1], run[-1]
            # Training samples are of the model before the row's M-step, dev samples of the model behind it.
            rises = last["iwae_bound"] > first["iwae_bound"]
            if rises and run[-2]["dev_iwae_bound"] < run[0]["dev_iwae_bound"]:
                yield f"{name}, seed {seed}: over-fitted, the bound rises on training questions and falls on dev ones"
            if rises and last["sample_em"] < first["sample_em"]:
                yield f"{name}, seed {seed}: unsupported answers, the bound rises while fewer samples answer right"


def _bounds_plot(results: Results) -> dict[str, Any]:
    """The first arm's bound on training and dev questions; training samples are of the model before the M-step."""
    runs = results.curves[results.first.arm]
    train = [(x - 1, *rest) for x, *rest in tables.curve(runs, "iwae_bound")]
    series = {"training questions": train, "dev questions": tables.curve(runs, "dev_iwae_bound")}
    title = f"mean and range of {len(runs)} seeds"
    return {"kind": "line", "x": "iteration", "y": "IWAE bound, nats", "title": title, "series": series}


def claims_of(results: Results, bounds: tuple[np.ndarray, np.ndarray]) -> Iterator[Claim]:
    """The claims of the paper, each where its systems were evaluated."""
    first, (before, best) = results.first, bounds
    yield from _q_gains(results)
    yield results.compare(
        "dev IWAE bound", "the bound of dev questions rises from the warm-up to the best iteration", best, before
    )
    for metric, label in (("em", "exact match"), ("f1", "F1"), ("last_gold_hit", "the last sub-query's gold hits")):
        name = f"{first.label} - {WARM_UP}: {metric}"
        if results.measure(first, metric) is not None:  # of own questions nobody may say which passages are gold
            yield results.claim(name, f"EM raises {label} over the warm-up", first, WARM_UP, metric)
    statements = {System("uniform"): "weights by likelihood beat uniform ones"}
    for step in STEPS:
        statements[System(f"no_{step}")] = f"an agent trained without {step} answers less"
    for step in STEPS:
        statements[System.of(first, **{step: "off"})] = f"switching {step} off in testing lowers exact match"
    yield from holm(
        [
            results.claim(f"{first.label} - {system.label}", statement, first, system, "em")
            for system, statement in statements.items()
            if results.has(system)
        ]
    )
    shuffled = System.of(first, passages="shuffled")
    if results.has(shuffled):
        statement = f"the position of a passage does not matter (not worse by {PERMUTED} where they are permuted)"
        yield results.claim(shuffled.label, statement, shuffled, first, "em", margin=PERMUTED)
    if results.has("closed_book"):
        exact = results.values("closed_book", "em")
        statement = f"closed-book exact match is below {CLOSED_BOOK}"
        yield results.compare("closed book", statement, np.full(exact.shape, CLOSED_BOOK), exact)
    if results.has("single_shot"):
        stratum = "2-hop" if config_of(results).data.source == "world" else ""
        statement = f"the agent beats one search with the question {stratum}".strip()
        yield results.claim(f"{first.label} - single_shot", statement, first, "single_shot", "em", stratum=stratum)


def _q_gains(results: Results) -> Iterator[Claim]:
    """Every M-step of the first arm raises its own objective, in any seed and iteration."""
    gains = [row["q_gain"] for run in results.curves[results.first.arm] for row in run if "q_gain" in row]
    if gains:
        statement = "every M-step raises its own objective (smallest and largest change, nats)"
        yield always("q_gain", statement, gains, decisive=results.config.evaluation.decisive)
