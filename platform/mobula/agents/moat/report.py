"""The report of a `moat` run: success, the surrogate by stage, the gap, and the claims of the spec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobula.agents.moat.comparison import GOLD
from mobula.agents.moat.config import ARMS, INDEPENDENT, INTEGRATED, Config
from mobula.agents.moat.setting import State
from mobula.agents.worlds import SOURCES, Task
from mobula.alternation import Outcome, Row
from mobula.evaluation.claims import compare
from mobula.evaluation.intervals import mean_interval
from mobula.experiment import Claim, Measure, Report, Verdict

STAGES = ("prefer", "improve")
MOST_OFF = 0.02  # by how much the training of a matched arm may differ from the first one's
# Which claim of the spec an arm is the other side of.
CLAIM = {
    "extra_steps": "C1", "planner_only": "C5", "grounder_only": "C5", "random_pairs": "C5", "best_plan": "C5",
    "no_critic": "C6", "noisy_10": "C6", "noisy_30": "C6", "rft": "C7",
}  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """What was found: the test tasks, each seed's outcomes by arm, and its rows by agents and split."""

    config: Config
    tests: Mapping[str, Sequence[Task]]
    outcomes: Sequence[Mapping[str, Outcome]]
    solved: Sequence[Mapping[str, Mapping[str, list[Row]]]]

    @property
    def first(self) -> str:
        """The arm that the others are compared with."""
        return self.config.arms[0]

    @property
    def agents(self) -> list[str]:
        """All that solved the test tasks."""
        return list(self.solved[0])

    def success(self, agents: str, split: str) -> np.ndarray:
        """Success f[S, Q] by seed and task."""
        return np.array([[row["success"] for row in found[agents][split]] for found in self.solved])

    def iterations(self, arm: str) -> int:
        """How many iterations an arm has at most."""
        most = None if arm == INTEGRATED else ARMS[arm].most
        return min(self.config.alternation.iterations, most or self.config.alternation.iterations)

    def equal(self, arm: str) -> str:
        """The agents of the first arm after as many iterations as another arm has."""
        iterations = self.iterations(arm)
        return self.first if iterations == self.config.alternation.iterations else f"{self.first} T={iterations}"

    def compare(self, name: str, statement: str, a: np.ndarray, b: np.ndarray) -> Claim:
        """A claim, as decisive as the run is."""
        evaluation = self.config.evaluation
        return compare(name, statement, a, b, decisive=evaluation.decisive, resamples=evaluation.resamples)


def fill(report: Report, found: Findings) -> None:
    """Measures, tables, plots and claims."""
    report.notes.append(_header(found.config))
    report.notes.extend(f"tasks {split}: {len(tasks)}" for split, tasks in found.tests.items())
    report.notes.append(f"training seeds: {len(found.solved)}; intervals: 95 %, over seeds and tasks")
    resamples = found.config.evaluation.resamples
    for name in found.agents:
        for split in found.tests:
            report.measures[f"{name}/{split}"] = mean_interval(found.success(name, split), resamples=resamples)
    report.tables["Success on test tasks, per cent"] = _success_table(report.measures, found)
    report.tables["Success by family, per cent"] = _family_table(found)
    report.tables["Valid plans and exact calls, per cent"] = _quality_table(found)
    report.tables["Iterations, mean of seeds"] = _iterations(found)
    report.tables["Training, target tokens, mean of seeds"] = _training(found)
    report.notes.extend(_budget_notes(found))
    report.plots["surrogate"] = _stages_plot(found, "J_stages", "J", "J (nats per token)")
    report.plots["dev_success"] = _stages_plot(found, "dev_stages", "dev_success", "success on dev")
    report.plots["arms"] = _arms_plot(found)
    for split in found.tests:
        report.plots[f"success_{split}"] = _bars(report.measures, found, split)
    report.claims.extend(_claims(found))
    rows = [row for outcomes in found.outcomes for outcome in outcomes.values() for row in outcome.rows]
    report.cost["alternation_s"] = sum(row["seconds"] for row in rows)


def _header(config: Config) -> str:
    """What was compared, and what it is not."""
    agents = f"{config.model.base} adapted twice" if config.model.base else "small networks trained here"
    return (
        f"agents: {agents}; tasks: {SOURCES[config.tasks.source].title}; not the paper's 7B models and benchmarks, "
        "whose figures are quoted, not reproduced"
    )


def _success_table(measures: Mapping[str, Measure], found: Findings) -> list[list[Any]]:
    def cell(measure: Measure) -> str:
        return f"{100 * measure.value:.1f} [{100 * measure.low:.1f}, {100 * measure.high:.1f}]"

    rows: list[list[Any]] = [["agents", *found.tests]]
    return rows + [[name, *(cell(measures[f"{name}/{split}"]) for split in found.tests)] for name in found.agents]


def _family_table(found: Findings) -> list[list[Any]]:
    members = {
        (split, family): np.array([task.family == family for task in tasks])
        for split, tasks in found.tests.items()
        for family in dict.fromkeys(task.family for task in tasks)
    }
    rows: list[list[Any]] = [["agents", *(f"{family}, {split}" for split, family in members)]]
    for name in found.agents:
        success = {split: found.success(name, split) for split in found.tests}
        cells = [100 * float(success[split][:, mine].mean()) for (split, _), mine in members.items()]
        rows.append([name, *(round(cell, 1) for cell in cells)])
    return rows


def _quality_table(found: Findings) -> list[list[Any]]:
    """How many plans are valid, and how many gold calls the programs have at their places, where there are any."""

    def mean(rows: Sequence[Row], name: str) -> Any:
        values = [row[name] for row in rows if row[name] is not None]
        return round(100 * float(np.mean(values)), 1) if values else ""

    measured = (("valid", "valid plans"), ("calls", "exact calls"))
    table: list[list[Any]] = [["agents", *(f"{title}, {split}" for split in found.tests for _, title in measured)]]
    for name in found.agents:
        rows = {split: [row for seed in found.solved for row in seed[name][split]] for split in found.tests}
        table.append([name, *(mean(rows[split], column) for split in found.tests for column, _ in measured)])
    return table


def _iterations(found: Findings) -> list[list[Any]]:
    names = ("J", "dev_success", "gap_nll", "n_pairs", "margin", "chosen_lp_shift", "dup_rate", "parse_rate",
             "leak_rate", "critic_accept", "critic_correct", "critic_drop",
             "critic_precision", "critic_recall", "canary_rate")  # fmt: skip
    rows: list[list[Any]] = [["arm", "iteration", *names]]
    for arm in found.outcomes[0]:
        runs = [outcomes[arm].rows for outcomes in found.outcomes]
        for iteration in range(max(map(len, runs))):
            at = [run[iteration] for run in runs if iteration < len(run)]
            values = [[row[name] for row in at if name in row] for name in names]
            rows.append([arm, iteration, *(round(float(np.mean(v)), 4) if v else "" for v in values)])
    return rows


def _tokens(found: Findings, arm: str, iterations: int) -> float:
    """Target tokens that an arm learned from in its first iterations, mean of seeds."""
    runs = [outcomes[arm].rows[1 : iterations + 1] for outcomes in found.outcomes]
    return float(np.mean([sum(row["tokens"] for row in run) for run in runs]))


def _training(found: Findings) -> list[list[Any]]:
    """How much each arm learned from, beside the first arm in as many iterations."""
    rows: list[list[Any]] = [["arm", "iterations", "tokens", f"of {found.first}"]]
    for arm in found.outcomes[0]:
        iterations = found.iterations(arm)
        tokens, first = _tokens(found, arm, iterations), _tokens(found, found.first, iterations)
        rows.append([arm, iterations, round(tokens), f"{tokens / first:.3f}" if first else ""])
    return rows


def _budget_notes(found: Findings) -> Iterator[str]:
    for arm in found.outcomes[0]:
        iterations = found.iterations(arm)
        tokens, first = _tokens(found, arm, iterations), _tokens(found, found.first, iterations)
        if ARMS[arm].matched and abs(tokens - first) > MOST_OFF * first:
            yield f"{arm} learned from {tokens / first - 1:+.1%} target tokens beside {found.first}: no equal budget"


def _stages_plot(found: Findings, candidates: str, standing: str, label: str) -> dict[str, Any]:
    """What each stage of the first arm trained, accepted or not, and the agents that stood after it, mean of seeds."""
    runs = [outcomes[found.first].rows for outcomes in found.outcomes]
    trained: list[list[float]] = [[] for _ in range(2 * max(map(len, runs)) - 1)]
    stood: list[list[float]] = [[] for _ in trained]
    for run in runs:
        for row in run:
            place = 2 * row["iteration"]
            stood[place].append(row[standing])
            for offset, stage in ((-1, "prefer"), (0, "improve")):
                value = row.get(candidates, {}).get(stage)
                if value is not None:
                    trained[place + offset].append(value)
    series = {"trained, accepted or not": _with_spread(trained), "standing after the gate": _with_spread(stood)}
    title = f"{found.first}, {len(runs)} seeds, 95 % of their mean"
    return {"kind": "line", "x": "stage (two an iteration)", "y": label, "title": title, "series": series}


def _with_spread(values: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """(stage, mean, low, high) where there are values."""
    points: list[tuple[float, ...]] = []
    for stage, found in enumerate(values):
        if found:
            mean = float(np.mean(found))
            spread = 1.96 * float(np.std(found, ddof=1)) / np.sqrt(len(found)) if len(found) > 1 else 0.0
            points.append((stage, mean, mean - spread, mean + spread))
    return points


def _arms_plot(found: Findings) -> dict[str, Any]:
    """Success on dev of every arm's agents, mean of seeds."""
    series = {}
    for arm in found.outcomes[0]:
        runs = [outcomes[arm].rows for outcomes in found.outcomes]
        # An arm that stopped stands where it stood.
        values = [[run[min(i, len(run) - 1)]["dev_success"] for run in runs] for i in range(max(map(len, runs)))]
        series[arm] = [(i, float(np.mean(value))) for i, value in enumerate(values)]
    title = f"mean of {len(found.outcomes)} seeds"
    return {"kind": "line", "x": "iteration", "y": "success on dev", "title": title, "series": series}


def _bars(measures: Mapping[str, Measure], found: Findings, split: str) -> dict[str, Any]:
    bars = {}
    for name in found.agents:
        measure = measures[f"{name}/{split}"]
        bars[name] = [100 * value for value in (measure.value, measure.low, measure.high)]
    title = f"{len(found.tests[split])} tasks, {len(found.solved)} seeds"
    return {"kind": "bars", "x": "", "y": f"success, {split} (%)", "title": title, "bars": bars}


def _claims(found: Findings) -> Iterator[Claim]:
    first = found.first
    rivals = [INDEPENDENT, *(arm for arm in found.config.arms[1:] if CLAIM.get(arm) == "C1")]
    for claim, split, where in (("C1", "test_in", "trained"), ("C2", "test_out", "held-out")):
        for other in rivals:
            statement = f"{first} beats {other} on {where} compositions"
            yield found.compare(f"{claim} {other}", statement, found.success(first, split), found.success(other, split))
    yield from _steps(found)
    for arm in found.config.arms[1:]:
        if CLAIM.get(arm, "C1") != "C1":
            mine = found.equal(arm)
            statement = f"{mine} beats {arm} on trained compositions"
            a, b = found.success(mine, "test_in"), found.success(arm, "test_in")
            yield found.compare(f"{CLAIM[arm]} {arm}", statement, a, b)
    yield from _gaps(found)


def _gaps(found: Findings) -> Iterator[Claim]:
    names = (INDEPENDENT, found.first)
    gaps = [found.success(name + GOLD, "test_in") - found.success(name, "test_in") for name in names]
    yield found.compare("C8 gap_s", "the gap in success between gold and own plans closes", *gaps)
    histories = [outcomes[found.first].history for outcomes in found.outcomes]
    before, after = (
        np.array([State.latest(h).gap for h in each]) for each in ([h.until(0) for h in histories], histories)
    )
    yield found.compare("C8 gap_nll", "the gap in likelihood between gold and own plans closes", before, after)


def _steps(found: Findings) -> Iterator[Claim]:
    """C3: the surrogate of what each stage trained, before the gate looked at it, against what stood before."""
    evaluation = found.config.evaluation
    outcomes = [outcomes[found.first] for outcomes in found.outcomes]
    for iteration in range(1, found.config.alternation.iterations + 1):
        for stage in STAGES:
            changes = [values for o in outcomes if (values := _change(o, iteration, stage)) is not None]
            if not changes:
                continue
            change = mean_interval(np.array(changes), resamples=evaluation.resamples)
            holds: Verdict = "holds" if change.high >= 0 else "does_not_hold"
            yield Claim(
                f"C3 {iteration} {stage}",
                f"the surrogate does not fall in stage {stage} of iteration {iteration} (interval reaches 0)",
                change.value,
                change.low,
                change.high,
                change.n,
                holds if evaluation.decisive else "undecided",
            )


def _change(outcome: Outcome, iteration: int, stage: str) -> list[float] | None:
    """How the surrogate of every probe task changed with the first attempt of a stage; None if nothing was trained."""
    this = outcome.history.only(iteration)
    if not this.ran(f"{stage}-0-gate"):
        return None
    return this.facts(f"{stage}-0-gate").get("J_changes")
