"""The report of a `moat` run: success, the surrogate by stage, the gap, and the claims of the spec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobula.agents.moat.config import INDEPENDENT, Config
from mobula.agents.worlds import Task
from mobula.alternation import Outcome, Row
from mobula.evaluation.claims import compare
from mobula.evaluation.intervals import mean_interval
from mobula.experiment import Claim, Measure, Report

GOLD = " gold plan"
HEADER = (
    "agents of well under 2 M parameters in a procedural world; not the paper's 7B models and benchmarks, whose "
    "figures are quoted, not reproduced"
)


@dataclass(frozen=True)
class Findings:
    """What was found: the test tasks, each seed's outcomes by arm, and its rows by agents and split."""

    config: Config
    tests: Mapping[str, Sequence[Task]]
    outcomes: Sequence[Mapping[str, Outcome]]
    solved: Sequence[Mapping[str, Mapping[str, list[Row]]]]

    def success(self, agents: str, split: str) -> np.ndarray:
        """Success f[S, Q] by seed and task."""
        return np.array([[row["success"] for row in found[agents][split]] for found in self.solved])


def fill(report: Report, found: Findings) -> None:
    """Measures, tables, plots and claims."""
    evaluation = found.config.evaluation
    report.notes.append(HEADER)
    report.notes.extend(f"tasks {split}: {len(tasks)}" for split, tasks in found.tests.items())
    agents = [INDEPENDENT, *found.config.arms]
    for name in agents:
        for split in found.tests:
            for kind in ("", GOLD):
                values = found.success(name + kind, split)
                report.measures[f"{name}{kind}/{split}"] = mean_interval(values, resamples=evaluation.resamples)
    report.tables["Success on test tasks, per cent"] = _success_table(report.measures, agents, list(found.tests))
    report.tables["Success by family, per cent"] = _family_table(found, agents)
    report.tables["Iterations, mean of seeds"] = _iterations(found)
    report.plots["surrogate"] = _curve(found, "J", "J (nats per token)")
    report.plots["dev_success"] = _curve(found, "dev_success", "success on dev")
    report.claims.extend(_claims(found))
    rows = [row for outcomes in found.outcomes for outcome in outcomes.values() for row in outcome.rows]
    report.cost["alternation_s"] = sum(row["seconds"] for row in rows)


def _success_table(measures: Mapping[str, Measure], agents: Sequence[str], splits: Sequence[str]) -> list[list[Any]]:
    def cell(measure: Measure) -> str:
        return f"{100 * measure.value:.1f} [{100 * measure.low:.1f}, {100 * measure.high:.1f}]"

    header = ["agents", *splits, *(f"{split}, gold plan" for split in splits)]
    rows = [
        [name, *(cell(measures[f"{name}{kind}/{split}"]) for kind in ("", GOLD) for split in splits)] for name in agents
    ]
    return [header, *rows]


def _family_table(found: Findings, agents: Sequence[str]) -> list[list[Any]]:
    families = list(dict.fromkeys(task.family for tasks in found.tests.values() for task in tasks))
    rows: list[list[Any]] = [["agents", *(f"{f}, {split}" for split in found.tests for f in families)]]
    for name in agents:
        cells = []
        for split, tasks in found.tests.items():
            names = np.array([task.family for task in tasks])
            values = found.success(name, split)
            cells += [round(100 * float(values[:, names == family].mean()), 1) for family in families]
        rows.append([name, *cells])
    return rows


def _iterations(found: Findings) -> list[list[Any]]:
    names = ("J", "dev_success", "n_pairs", "margin", "chosen_lp_shift", "dup_rate", "parse_rate", "leak_rate",
             "critic_accept", "critic_correct", "critic_drop", "canary_rate")  # fmt: skip
    rows: list[list[Any]] = [["arm", "iteration", *names]]
    for arm in found.config.arms:
        runs = [outcomes[arm].rows for outcomes in found.outcomes]
        for iteration in range(max(map(len, runs))):
            at = [run[iteration] for run in runs if iteration < len(run)]
            values = [[row[name] for row in at if name in row] for name in names]
            rows.append([arm, iteration, *(round(float(np.mean(v)), 4) if v else "" for v in values)])
    return rows


def _curve(found: Findings, name: str, label: str) -> dict[str, Any]:
    """Every seed's iterations, the agents that stand after the gate."""
    series = {}
    for arm in found.config.arms:
        for seed, outcomes in enumerate(found.outcomes, found.config.seed):
            series[f"{arm}, seed {seed}"] = [(row["iteration"], row[name]) for row in outcomes[arm].rows]
    return {"kind": "line", "x": "iteration", "y": label, "series": series}


def _claims(found: Findings) -> Iterator[Claim]:
    evaluation = found.config.evaluation
    first = found.config.arms[0]

    def against(name: str, statement: str, other: str, split: str) -> Claim:
        a, b = found.success(first, split), found.success(other, split)
        decisive, resamples = evaluation.decisive, evaluation.resamples
        return compare(name, statement, a, b, decisive=decisive, resamples=resamples)

    yield against(
        "C1 independent", f"{first} beats independent training on trained compositions", INDEPENDENT, "test_in"
    )
    yield against("C2 independent", f"{first} beats independent training on held-out ones", INDEPENDENT, "test_out")
    for other in found.config.arms[1:]:
        label = "C6" if other == "no_critic" else "C5"
        yield against(f"{label} {other}", f"{first} beats {other} on trained compositions", other, "test_in")
    yield from _steps(found, first)
    gaps = [found.success(name + GOLD, "test_in") - found.success(name, "test_in") for name in (INDEPENDENT, first)]
    yield compare(
        "C8 gap_s",
        "the gap between gold and own plans closes",
        gaps[0],
        gaps[1],
        decisive=evaluation.decisive,
        resamples=evaluation.resamples,
    )


def _steps(found: Findings, arm: str) -> Iterator[Claim]:
    """C3: the surrogate of what each stage trained, before the gate looked at it, against what stood before."""
    runs = [outcomes[arm].rows for outcomes in found.outcomes]
    for iteration in range(1, min(map(len, runs))):
        for stage in ("prefer", "improve"):
            pairs = [(_before(run, iteration, stage), run[iteration]["J_stages"].get(stage)) for run in runs]
            changes = np.array([after - before for before, after in pairs if after is not None])
            if len(changes) < 2:
                continue
            slack = 2 * float(changes.std(ddof=1)) / np.sqrt(len(changes))
            low, high = float(changes.mean() - slack), float(changes.mean() + slack)
            holds = "undecided" if not found.config.evaluation.decisive else "holds" if high >= 0 else "does_not_hold"
            statement = (
                f"the surrogate does not fall in iteration {iteration}, stage {stage} (within two standard errors)"
            )
            yield Claim(f"C3 {iteration} {stage}", statement, float(changes.mean()), low, high, len(changes), holds)  # type: ignore[arg-type]


def _before(run: Sequence[Row], iteration: int, stage: str) -> float:
    """The surrogate of the agents that a stage began with."""
    row, earlier = run[iteration], run[iteration - 1]["J"]
    if stage == "improve" and row["gate"].get("prefer"):
        return float(row["J_stages"]["prefer"])
    return float(earlier)
