"""The report of an `exsearch` run: answers and searches, curves by iteration, and the claims of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobula.alternation import Row
from mobula.errors import MobulaError
from mobula.evaluation.claims import always, compare
from mobula.evaluation.intervals import mean_interval, paired_difference
from mobula.experiment import Claim, Measure, Report
from mobula.rag.exsearch.config import CLOSED_BOOK, WARM, Config
from mobula.rag.exsearch.measures import MEASURES, means

BY_ITERATION = {
    "Dev questions by iteration, mean of seeds": (
        "dev_em", "dev_f1", "dev_last_gold_hit", "dev_searches", "dev_malformed", "held_bound", "held_sample_em",
    ),
    "E-step by iteration, mean of seeds": (
        "bound", "gap", "sample_em", "sample_in_facts", "ess", "largest", "all_fail", "skipped", "unique", "variance",
        "sample_surprise",
    ),
}  # fmt: skip
PLOTTED = {
    "dev_em": "exact match, dev",
    "dev_f1": "F1, dev",
    "held_bound": "log of the mean likelihood of held-out questions (B_m)",
}
ORDER = 0.02  # exact match that may be lost where passages stand in another order


@dataclass(frozen=True)
class Findings:
    """Rows of metrics by arm and seed, answers to test questions by name and seed, and the bounds of the first arm.

    ``off``: names of the first arm with a step switched off, and the step; ``shuffled``: its name with what it is shown
    in another order. ``bounds`` f[S, Q], twice: log of the mean
    likelihood of dev questions' samples before the first iteration and at the best one. ``harness``: by name, what
    all of them must share.
    """

    config: Config
    rows: Mapping[str, Sequence[Sequence[Row]]]
    solved: Mapping[str, Sequence[Sequence[Row]]]
    off: Mapping[str, str]
    shuffled: str
    bounds: tuple[np.ndarray, np.ndarray]
    harness: Mapping[str, str]

    @property
    def first(self) -> str:
        """The arm that the others are compared with."""
        return self.config.arms[0]

    def values(self, name: str, what: str, kind: str = "") -> np.ndarray:
        """f[S, Q] by seed and test question that has the measure; ``kind``: how the questions' kinds begin."""
        runs = self.solved[name]
        chosen = [i for i, row in enumerate(runs[0]) if row[what] is not None and row["kind"].startswith(kind)]
        return np.array([[run[i][what] for i in chosen] for run in runs], dtype=float)


def fill(report: Report, found: Findings) -> None:
    """Measures, tables, plots and claims."""
    config, resamples = found.config, found.config.evaluation.resamples
    report.notes.append(_header(config))
    report.notes.append(f"test questions: {config.data.test}; training seeds: {config.evaluation.seeds}")
    report.notes.append(f"every arm has the backbone, retriever, limits and data {_shared(found)}")
    report.notes.extend(_warnings(found))
    for name in found.solved:
        for what in MEASURES:
            values = found.values(name, what)
            if values.size:
                report.measures[f"{name}/{what}"] = mean_interval(values, resamples=resamples)
    report.tables["Test questions"] = _tests(report.measures, list(found.solved))
    report.tables[f"Exact match beside that of {found.first}, points"] = _differences(found)
    report.tables["Exact match by kind of question, per cent"] = _kinds(found)
    report.tables["Searches and what went wrong, test"] = _searches(found)
    for title, columns in BY_ITERATION.items():
        report.tables[title] = _iterations(found, columns)
    for what, label in PLOTTED.items():
        report.plots[what] = _plot(found, list(found.rows), what, label)
    report.plots["bounds"] = _both_bounds(found)
    report.claims.extend(_claims(found))
    report.cost["seconds_per_question"] = float(np.mean([r["seconds"] for r in found.solved[found.first][0]]))


def _shared(found: Findings) -> str:
    """What every arm has.

    Raises:
        MobulaError: if one has another: what is compared would not be the arms.
    """
    names = set(found.harness.values())
    if len(names) > 1:
        raise MobulaError(f"arms differ in backbone, retriever, limits or data: {dict(found.harness)}")
    return names.pop()


def _header(config: Config) -> str:
    if config.model.base:
        return f"{config.model.base} under adapters; not the paper's models and benchmarks, whose figures are quoted"
    return (
        "an agent of about 0.13 M parameters in a generated world; not the paper's 7B models and benchmarks, whose "
        "figures are quoted, not reproduced"
    )


def _warnings(found: Findings) -> Iterator[str]:
    em = found.config.em
    if found.config.rollout.heuristic and em.weights.correction == "none":
        yield "heuristic weights: trajectories are drawn at another temperature or nucleus than the model's own"
    if em.samples == 1 and em.weights.rule == "snis":
        yield "no signal: one sample has weight 1 whatever its likelihood"
    for name, runs in found.rows.items():
        for seed, run in enumerate(runs, found.config.seed):
            if len(run) < 3:
                continue
            first, last = run[1], run[-1]
            # Training samples are of the model before the row's M-step, held-out ones of the model behind it.
            if last["bound"] > first["bound"] and run[-2]["held_bound"] < run[0]["held_bound"]:
                yield f"{name}, seed {seed}: over-fitted, B_m rises on training questions and falls on held-out ones"
            if last["bound"] > first["bound"] and last["sample_em"] < first["sample_em"]:
                yield f"{name}, seed {seed}: unsupported answers, B_m rises while fewer samples answer right"


def _cell(measures: Mapping[str, Measure], key: str, scale: float) -> str:
    measure = measures.get(key)
    if measure is None:
        return ""
    return f"{scale * measure.value:.1f} [{scale * measure.low:.1f}, {scale * measure.high:.1f}]"


def _tests(measures: Mapping[str, Measure], names: Sequence[str]) -> list[list[Any]]:
    columns = ("em", "f1", "acc", "answer_hit", "gold_hit", "last_gold_hit")
    table: list[list[Any]] = [["arm", "EM, per cent", "F1", "accuracy", *(c.replace("_", " ") for c in columns[3:])]]
    return table + [[name, *(_cell(measures, f"{name}/{what}", 100.0) for what in columns)] for name in names]


def _differences(found: Findings) -> list[list[Any]]:
    """By how much every other arm answers more questions than the first, paired by seed and question."""
    first, resamples = found.values(found.first, "em"), found.config.evaluation.resamples
    table: list[list[Any]] = [["arm", "difference"]]
    for name in found.solved:
        if name != found.first:
            difference = paired_difference(found.values(name, "em"), first, resamples=resamples)
            table.append([name, _cell({name: difference}, name, 100.0)])
    return table


def _kinds(found: Findings) -> list[list[Any]]:
    kinds = sorted({row["kind"] for row in found.solved[found.first][0]})
    table: list[list[Any]] = [["arm", *kinds]]
    for name, runs in found.solved.items():
        rows = [row for run in runs for row in run]
        means_of = [np.mean([row["em"] for row in rows if row["kind"] == kind]) for kind in kinds]
        table.append([name, *(round(100 * float(value), 1) for value in means_of)])
    return table


def _searches(found: Findings) -> list[list[Any]]:
    columns = MEASURES[MEASURES.index("searches") :]
    table: list[list[Any]] = [["arm", *(column.replace("_", " ") for column in columns)]]
    for name, runs in found.solved.items():
        values = means([row for run in runs for row in run], columns)
        table.append([name, *(round(values[column], 3) for column in columns)])
    return table


def _iterations(found: Findings, columns: Sequence[str]) -> list[list[Any]]:
    names = [column.removeprefix("dev_").replace("_", " ") for column in columns]
    table: list[list[Any]] = [["arm", "iteration", *names]]
    for name, runs in found.rows.items():
        for iteration in range(max(map(len, runs))):
            at = [run[iteration] for run in runs if iteration < len(run)]
            values = [[row[column] for row in at if column in row] for column in columns]
            if any(values):
                table.append([name, iteration, *(round(float(np.mean(v)), 3) if v else "" for v in values)])
    return table


def _plot(found: Findings, names: Sequence[str], what: str, label: str) -> dict[str, Any]:
    series = {name: _curve(found.rows[name], what) for name in names}
    return {"kind": "line", "x": "iteration", "y": label, "title": _title(found), "series": series}


def _both_bounds(found: Findings) -> dict[str, Any]:
    """B_m of the first arm on training and on held-out questions; each samples with the model before its M-step."""
    runs = found.rows[found.first]
    train = [(x - 1, *rest) for x, *rest in _curve(runs, "bound")]
    series = {"training questions": train, "held-out questions": _curve(runs, "held_bound")}
    return {"kind": "line", "x": "iteration", "y": "B_m, nats", "title": _title(found), "series": series}


def _title(found: Findings) -> str:
    return f"mean and range of {found.config.evaluation.seeds} seeds"


def _curve(runs: Sequence[Sequence[Row]], what: str) -> list[tuple[float, ...]]:
    """(iteration, mean, least, greatest) over seeds."""
    points: list[tuple[float, ...]] = []
    for iteration in range(min(map(len, runs))):
        values = [run[iteration][what] for run in runs if what in run[iteration]]
        if values:
            points.append((float(iteration), float(np.mean(values)), min(values), max(values)))
    return points


def _claims(found: Findings) -> Iterator[Claim]:
    first, config = found.first, found.config
    yield from _gaps(found)

    def claim(name: str, statement: str, a: np.ndarray, b: np.ndarray, margin: float = 0.0) -> Claim:
        how = config.evaluation
        return compare(name, statement, a, b, margin=margin, decisive=how.decisive, resamples=how.resamples)

    before, best = found.bounds
    yield claim("held-out bound", "the held-out bound rises from the warm-up to the best iteration", best, before)
    for what, label in (("em", "exact match"), ("f1", "F1"), ("last_gold_hit", "the last sub-query's gold hits")):
        one, other = found.values(first, what), found.values(WARM, what)
        yield claim(f"{first} - {WARM}: {what}", f"EM raises {label} over the warm-up", one, other)
    exact = {name: found.values(name, "em") for name in found.solved}
    statements = {"uniform": "weights by likelihood beat uniform ones"}
    statements |= {
        f"no_{step}": f"an agent trained without {step} answers less" for step in ("think", "search", "record")
    }
    statements |= {name: f"switching {step} off in testing lowers exact match" for name, step in found.off.items()}
    for name, statement in statements.items():
        if name in exact:
            yield claim(f"{first} - {name}", statement, exact[first], exact[name])
    if found.shuffled in exact:
        statement = f"where a passage is shown does not matter (not worse by {ORDER} in another order)"
        yield claim(found.shuffled, statement, exact[found.shuffled], exact[first], ORDER)
    if "closed_book" in exact:
        most = np.full(exact["closed_book"].shape, CLOSED_BOOK)
        yield claim("closed book", f"closed-book exact match is below {CLOSED_BOOK}", most, exact["closed_book"])
    if "single_shot" in exact:
        kind = "2-hop" if config.data.source == "world" else ""
        one, other = found.values(first, "em", kind), found.values("single_shot", "em", kind)
        yield claim(
            f"{first} - single_shot", f"the agent beats one search with the question {kind}".strip(), one, other
        )


def _gaps(found: Findings) -> Iterator[Claim]:
    """Every M-step of the first arm raises its own objective, in any seed and iteration."""
    gaps = [row["gap"] for run in found.rows[found.first] for row in run if "gap" in row]
    if gaps:
        statement = "every M-step raises its own objective (smallest and largest change, nats)"
        yield always("gaps", statement, gaps, decisive=found.config.evaluation.decisive)
