"""The report of a `moat` run: success, the surrogate by stage, the gap between gold and own plans, and the claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mobula.agents.moat.config import ARMS, INDEPENDENT, INTEGRATED, UNGATED, Config
from mobula.agents.moat.data import TESTS
from mobula.agents.moat.moat import stages
from mobula.agents.moat.stage import chosen_iteration, current_checkpoint
from mobula.agents.worlds import SOURCES
from mobula.alternation import Outcome
from mobula.evaluation import tables
from mobula.evaluation.claims import holm_by_statement
from mobula.evaluation.intervals import mean_interval
from mobula.experiment import Claim, Report, Verdict
from mobula.models.endpoint import total_usage
from mobula.study import Results, System

MOST_OFF = 0.02  # by how much the training of a budget-matched arm may differ from that of its counterpart
GOLD_PLAN = {"plan": "gold"}
METRICS = {"test_in": "trained compositions", "test_out": "held-out compositions"} | {
    f"{metric}_{split}": f"{title}, {split}"
    for split in TESTS
    for metric, title in (("valid", "valid plans"), ("calls", "exact calls"))
}
ITERATIONS = ("J", "dev_success", "gap_nll", "n_pairs", "margin", "chosen_lp_shift", "dup_rate", "parse_rate",
              "leak_rate", "critic_accept", "critic_correct", "critic_drop",
              "critic_precision", "critic_recall", "canary_rate")  # fmt: skip
# Which claim an arm is the other side of.
CLAIM = {
    "extra_steps": "C1", "planner_only": "C5", "grounder_only": "C5", "random_pairs": "C5", "best_plan": "C5",
    "no_critic": "C6", "noisy_10": "C6", "noisy_30": "C6", "rft": "C7", UNGATED: "gate", INTEGRATED: "one-model",
}  # fmt: skip
Outcomes = Mapping[str, Sequence[Outcome]]  # by arm and seed


def build_report(report: Report, config: Config, results: Results, outcomes: Outcomes) -> None:
    """Measures, tables, plots and claims."""
    agents = f"{config.model.base} adapted twice" if config.model.base else "small networks trained here"
    report.notes.append(
        f"agents: {agents}; tasks: {SOURCES[config.tasks.source].title}; not the paper's 7B models and benchmarks, "
        "whose figures are quoted, not reproduced"
    )
    report.notes.extend(f"tasks {split}: {config.tasks.sizes[split]}" for split in TESTS)
    labels = {"dev_success": "success on dev", "J": "J (nats per token)"}
    results.report(report, METRICS, labels, examples="Success, valid plans and exact calls on test tasks, per cent")
    systems, strata = {system.label: system for system in results.rows}, results.strata()
    if len(strata) > 1:
        held_out = tables.measures(
            systems, dict(zip(strata, strata, strict=True)), lambda a, s: report.measures.get(f"{a}/test_out/{s}")
        )
        report.tables[f"{METRICS['test_out']} by stratum"] = held_out
    report.tables["Iterations, mean of seeds"] = tables.iterations(results.curves, ITERATIONS, digits=4)
    report.tables["Training, mean of seeds"] = _training(config, outcomes)
    report.notes.extend(_budget_notes(config, outcomes))
    first = outcomes[config.arms[0]]
    names = [stage.name for stage in stages(ARMS[config.arms[0]])]
    report.plots["surrogate_by_stage"] = _stages_plot(first, names, "J_stages", "J", labels["J"])
    report.plots["success_by_stage"] = _stages_plot(first, names, "dev_stages", "dev_success", "success on dev")
    for split in TESTS:
        bars = {label: report.measures.get(f"{label}/{split}") for label in systems}
        report.plots[f"success_{split}"] = tables.bars_plot(bars, f"success, {split} (%)")
    report.claims.extend(holm_by_statement(_claims(config, results, first)))
    rows = [row for runs in outcomes.values() for outcome in runs for row in outcome.rows]
    report.cost["alternation_s"] = sum(row["seconds"] for row in rows)
    spent = total_usage(row["critic_usage"] for row in rows if "critic_usage" in row)
    report.cost |= {f"critic_{name}": count for name, count in spent.items()}


def _budget(config: Config, outcomes: Outcomes, arm: str) -> tuple[float, float]:
    """The target tokens of an arm and, in as many iterations, of the arm that it is compared with; mean of seeds."""

    def tokens(run: Outcome) -> float:
        return sum(row["tokens"] for row in run.rows[1 : config.iterations(arm) + 1])

    own, other = (np.mean([*map(tokens, outcomes[name])]) for name in (arm, config.counterpart(arm).arm))
    return float(own), float(other)


def _training(config: Config, outcomes: Outcomes) -> tables.Table:
    """What was trained and kept by arm: stages offered to the gate and accepted, over all seeds; the tokens."""
    head = ["arm", "iterations", "stages accepted", "of those offered", "iteration chosen", "tokens", "compared with"]
    table: tables.Table = [[*head, "tokens of that"]]
    for arm, runs in outcomes.items():
        decisions = [kept for run in runs for row in run.rows[1:] for kept in row["gate"].values() if kept is not None]
        chosen = np.mean([chosen_iteration(ARMS[arm], run.rows, config) for run in runs])
        tokens, other = _budget(config, outcomes, arm)
        share = f"{tokens / other:.3f}" if other else ""
        row = [arm, config.iterations(arm), sum(decisions), len(decisions), round(float(chosen), 2), round(tokens)]
        table.append([*row, config.counterpart(arm).label, share])
    return table


def _budget_notes(config: Config, outcomes: Outcomes) -> Iterator[str]:
    for arm in outcomes:
        tokens, other = _budget(config, outcomes, arm)
        if ARMS[arm].budget_matched and abs(tokens - other) > MOST_OFF * other:
            against = config.counterpart(arm).arm
            yield f"{arm} learned from {tokens / other - 1:+.1%} target tokens beside {against}: no equal budget"


def _stages_plot(
    runs: Sequence[Outcome], names: Sequence[str], candidates: str, current: str, label: str
) -> dict[str, Any]:
    """What each stage of an arm trained, accepted or not, and the agents that the gate left."""
    trained: dict[int, list[float]] = {}
    kept: dict[int, list[float]] = {}
    for row in (row for run in runs for row in run.rows):
        last = len(names) * row["iteration"]
        kept.setdefault(last, []).append(row[current])
        for name, value in row.get(candidates, {}).items():
            trained.setdefault(last - len(names) + 1 + names.index(name), []).append(value)
    series = {
        name: [(stage, float(np.mean(seeds)), min(seeds), max(seeds)) for stage, seeds in sorted(values.items())]
        for name, values in (("trained, accepted or not", trained), ("after the gate", kept))
    }
    title = f"mean and range of {len(runs)} seeds"
    return {"kind": "line", "x": "stage", "y": label, "title": title, "series": series}


def _claims(config: Config, results: Results, first: Sequence[Outcome]) -> Iterator[Claim]:
    rivals = [INDEPENDENT, *(arm for arm in config.arms[1:] if CLAIM[arm] == "C1")]
    for claim, split, where in (("C1", "test_in", "trained"), ("C2", "test_out", "held-out")):
        for other in rivals:
            best = results.first if other == INDEPENDENT else config.counterpart(other)
            statement = f"{best} beats {other} on {where} compositions"
            yield results.claim(f"{claim} {other}", statement, best, other, split)
    yield from _surrogate(config, first)
    for arm in (arm for arm in config.arms[1:] if CLAIM[arm] != "C1"):
        best = config.counterpart(arm)
        yield results.claim(f"{CLAIM[arm]} {arm}", f"{best} beats {arm} on trained compositions", best, arm, "test_in")
    yield from _gaps(results, first)


def _gaps(results: Results, first: Sequence[Outcome]) -> Iterator[Claim]:
    success = [
        results.values(System.of(system, **GOLD_PLAN), "test_in") - results.values(system, "test_in")
        for system in (INDEPENDENT, results.first)
    ]
    histories = [[run.history.until(0) for run in first], [run.history.until(run.best) for run in first]]
    nll = [np.array([current_checkpoint(history).gap for history in runs]) for runs in histories]
    yield gap_closes(results, "C8 gap_s", "success", *success)
    yield gap_closes(results, "C8 gap_nll", "likelihood", *nll)


def gap_closes(results: Results, name: str, what: str, before: np.ndarray, after: np.ndarray) -> Claim:
    """The claim that |mean gap| shrinks, f[S, Q] between gold and own plans: a gap that turns round is one as well."""
    absolute = [gap * np.sign(gap.mean()) for gap in (before, after)]
    return results.compare(name, f"the absolute gap in {what} between gold and own plans closes", *absolute)


def _surrogate(config: Config, runs: Sequence[Outcome]) -> Iterator[Claim]:
    """C3: the surrogate of what each stage trained first, before the gate looked at it, against what it was before."""
    for iteration in range(1, config.alternation.iterations + 1):
        for stage in stages(ARMS[config.arms[0]]):
            attempts = [stage.attempts(run.history.only(iteration)) for run in runs]
            changes = [tried[0]["J_changes"] for tried in attempts if tried and "J_changes" in tried[0]]
            if not changes:
                continue
            change = mean_interval(np.array(changes), resamples=config.evaluation.resamples)
            holds: Verdict = "holds" if change.high >= 0 else "does_not_hold"
            verdict = holds if config.evaluation.decisive else "undecided"
            statement = f"J does not fall in stage {stage.name} of iteration {iteration} (interval reaches 0)"
            name, bounds = f"C3 {iteration} {stage.name}", (change.low, change.high)
            yield Claim(name, statement, change.value, *bounds, change.n, verdict)
