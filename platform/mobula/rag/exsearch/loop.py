"""EXSEARCH as phases of the alternation driver: sample trajectories, score, weigh, fit, and look at dev questions."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from mobula.alternation import Context, History, Loop, Phase, Row, Sharded, Step
from mobula.artifacts import read_jsonl, write_json, write_jsonl
from mobula.config import digest
from mobula.experiment import identity
from mobula.rag.exsearch.config import Arm, Config
from mobula.rag.exsearch.measures import MEASURES, means
from mobula.rag.exsearch.sources import Problem, corpus_of, problems_of
from mobula.rag.exsearch.start import warm_up_rows
from mobula.rag.exsearch.training import DATA, MODEL, QueryRows, RowsTask, tune, write_rows
from mobula.rag.exsearch.trajectory import TrainRow, Trajectory, own_rows, rows
from mobula.rag.exsearch.workers import Agent, GapWorker, SampleWorker, ScoreWorker, SolveWorker
from mobula.rag.objective import check_q_gain
from mobula.rag.weights import Sampled, Weights, weigh

STATE, WEIGHTS = "state.json", "weights.jsonl"
SHARD = 64  # questions, or trajectories, that are worked on at a time
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What the phases of one arm and seed share: the warm-up's model, and where questions come from."""

    config: Config
    arm: Arm
    start: Path
    seed: int

    def agent(self, model: Path, split: str) -> Agent:
        """A model in the corpus of a split."""
        config = self.config
        return Agent(model, corpus_of(config.data, split), config.retrieve, config.rollout, self.arm.mode)

    def problems(self, split: str) -> list[Problem]:
        """The questions of a split."""
        return problems_of(self.config.data, split)

    def standing(self, history: History) -> Path:
        """The model that the last fit left."""
        directory = next((d for _, _, d in reversed(history.finished) if (d / STATE).is_file()), None)
        if directory is None:
            return self.start
        return (directory / json.loads((directory / STATE).read_text())["model"]).resolve()


def em_loop(setting: Setting) -> Loop:
    """The phases of an arm."""
    watched = [_solve(setting), _sample(setting, "held_sample", "dev"), _score(setting, "held_score", "dev")]
    phases: list[Phase] = [
        _sample(setting, "sample", "train"),
        _score(setting, "score", "train"),
        Step("weigh", lambda context: _weigh(setting, context)),
        Step("fit", lambda context: _fit(setting, context)),
        *([_gap(setting)] if setting.arm.learns == "em" else []),
        *watched,
    ]
    decides = [identity(setting.config), asdict(setting.arm), setting.seed]
    return Loop(digest(decides), watched, phases, lambda history, iteration: _row(setting, history, iteration))


def _sample(setting: Setting, name: str, split: str) -> Phase:
    """Trajectories of every question. The items are questions alone: no answer reaches who samples."""

    def items(context: Context) -> list[Row]:
        return [{"id": problem.id, "question": problem.question} for problem in setting.problems(split)]

    def worker(context: Context) -> SampleWorker:
        agent = setting.agent(setting.standing(context.history), split)
        return SampleWorker(agent, setting.config.em.samples, context.seed)

    return Sharded(name, items, worker, SHARD)


def _score(setting: Setting, name: str, split: str) -> Phase:
    """The gold answer after every trajectory."""
    of = {"score": "sample", "held_score": "held_sample"}[name]

    def items(context: Context) -> list[Row]:
        answers = {problem.id: list(problem.answers) for problem in setting.problems(split)}
        return [{**row, "answers": answers[row["query"]]} for row in context.history.rows(of)]

    def worker(context: Context) -> ScoreWorker:
        return ScoreWorker(setting.agent(setting.standing(context.history), split))

    return Sharded(name, items, worker, 4 * SHARD)


def _solve(setting: Setting) -> Phase:
    """Dev questions, greedily."""
    return Sharded(
        "solve",
        lambda context: [asdict(problem) for problem in setting.problems("dev")],
        lambda context: SolveWorker(setting.agent(setting.standing(context.history), "dev")),
        SHARD,
    )


def by_query(scores: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of scores by question, in the order of samples."""
    found: dict[str, list[Row]] = {}
    for row in scores:
        found.setdefault(row["query"], []).append(row)
    return found


def weights_of(setting: Setting, scores: Sequence[Row]) -> Weights:
    """The weights of one question's samples; those that are too long or recorded too little leave first."""
    em, most = setting.config.em, setting.config.em.max_empty_facts
    kept = [row["log_lik"] is not None and (most is None or row["empty_facts"] <= most) for row in scores]
    log_lik = np.array([row["log_lik"] if keep else -np.inf for row, keep in zip(scores, kept, strict=True)])
    ratio, reward, exact = (np.array([row[name] for row in scores]) for name in ("log_ratio", em.reward, "em"))
    sampled = Sampled(log_lik.astype(float), scores[0]["answer_tokens"], ratio, reward, exact)
    return weigh(sampled, setting.config.of(setting.arm))


def _weigh(setting: Setting, context: Context) -> Row:
    """Weights of every question that has any, what is learned from them, and what samples and weights are like."""
    scores = by_query(context.history.rows("score"))
    found = {query: weights_of(setting, mine) for query, mine in scores.items()}
    write_jsonl(context.directory / WEIGHTS, (_weight_row(query, weights) for query, weights in found.items()))
    kept = {query: weights for query, weights in found.items() if not weights.skipped}
    write_rows(context.directory / DATA, _learned(setting, context.history, kept))
    values = [weights.values for weights in kept.values()]
    return {
        **sampled_facts(scores, found),
        "queries": len(kept),
        "skipped": len(found) - len(kept),
        "ess": float(np.mean([weights.ess for weights in kept.values()])) if kept else 0.0,
        "largest": float(np.mean([value.max() for value in values])) if kept else 0.0,
    }


def _weight_row(query: str, weights: Weights) -> Row:
    return {
        "query": query,
        "weights": weights.values.tolist(),
        "ess": weights.ess,
        "log_mean_lik": weights.log_mean_lik,
        "all_fail": bool(weights.all_fail),
        "skipped": weights.skipped,
    }


def _learned(setting: Setting, history: History, kept: dict[str, Weights]) -> list[QueryRows]:
    """What each question with weights teaches, samples of weight 0 left out; oracle rows beside it if configured."""
    model = setting.agent(setting.standing(history), "train").opened
    golds = {p.id: [*model.encode(p.answers[0]), model.eos] for p in setting.problems("train")}
    joint = {(r["query"], r["sample"]): (r["log_prior"], r["log_lik"]) for r in history.rows("score")}
    learns = own_rows if setting.arm.learns == "policy" else None
    found: dict[str, list[TrainRow]] = {query: [] for query in kept}
    before = dict.fromkeys(kept, 0.0)
    for row in history.rows("sample"):
        query, sample = row["query"], row["sample"]
        weight = float(kept[query].values[sample]) if query in kept else 0.0
        if weight:
            trajectory = Trajectory.read(row["trajectory"])
            found[query] += learns(trajectory, weight) if learns else rows(trajectory, golds[query], weight)
            before[query] += weight * sum(joint[query, sample])
    more = round(len(found) * setting.config.em.mix_warm_up)
    oracle = warm_up_rows(setting.config, setting.start, setting.seed, setting.arm.mode)[:more] if more else []
    return [*(QueryRows(found[query], before[query]) for query in found), *oracle]


def sampled_facts(scores: dict[str, list[Row]], found: dict[str, Weights]) -> Row:
    """What the samples of questions are like: B_m, exact match, answers found in facts, and how much they differ."""
    every = [row for mine in scores.values() for row in mine]
    chances = [np.exp([row["log_lik"] for row in mine if row["log_lik"] is not None]) for mine in scores.values()]
    bounds = [weights.log_mean_lik for weights in found.values() if np.isfinite(weights.log_mean_lik)]
    return {
        "bound": float(np.mean(bounds)) if bounds else 0.0,
        "all_fail": float(np.mean([weights.all_fail for weights in found.values()])),
        "unique": float(np.mean([len({tuple(r["queries"]) for r in mine}) / len(mine) for mine in scores.values()])),
        "variance": float(np.mean([np.var(values) for values in chances if len(values)])),
        "too_long": sum(row["log_lik"] is None for row in every),
        **{f"sample_{name}": float(np.mean([row[name] for row in every])) for name in ("em", "in_facts", "surprise")},
    }


def _fit(setting: Setting, context: Context) -> Row:
    """Train on the weighted rows, from the standing model or from the warm-up."""
    em, place = setting.config.em, context.history.latest("weigh")
    assert place is not None
    start = setting.standing(context.history) if em.start_from == "previous" else setting.start
    clip = em.clip if setting.arm.learns == "policy" else None
    task = RowsTask(start, place / DATA, em.answer_coef, clip)
    if not task.examples:
        log.warning("iteration %d: no question has a weight, so nothing is learned", context.iteration)
        return {"steps": 0}
    config = replace(setting.config.fit, steps=steps_of(setting.config, task.examples))
    result = tune(task, config, context.directory, context.seed, "fit")
    model = (context.directory / MODEL).resolve()
    write_json(context.directory / STATE, {"model": os.path.relpath(model, context.directory.resolve())})
    masks = [row.mask for found in task.queries for row in found]
    share = sum(map(bool, chain(*masks))) / sum(map(len, masks))
    return {"steps": result.steps, "tokens": task.tokens, "learned_share": share}


def steps_of(config: Config, queries: int) -> int:
    """The steps of an M-step over so many questions."""
    return max(1, round(config.em.epochs * queries / config.fit.batch))


def _gap(setting: Setting) -> Phase:
    """By how much the training has raised the objective that it was given: Delta Q."""

    def items(context: Context) -> list[Row]:
        place = context.history.latest("weigh")
        assert place is not None
        trained = context.history.facts("fit")["steps"]
        return [row for row in read_jsonl(place / DATA) if trained and row["before"] is not None]

    def worker(context: Context) -> GapWorker:
        return GapWorker(setting.agent(setting.standing(context.history), "train"))

    return Sharded("gap", items, worker, SHARD)


def _row(setting: Setting, history: History, iteration: int) -> Row:
    """The row of metrics of an iteration.

    Raises:
        MStepFailed: if the training lowered its own objective by more than ``em.min_q_gain``.
    """
    solved, held = history.rows("solve"), by_query(history.rows("held_score"))
    facts = sampled_facts(held, {query: weights_of(setting, mine) for query, mine in held.items()})
    row = {f"dev_{name}": value for name, value in means(solved, MEASURES).items()}
    row |= {f"held_{name}": facts[name] for name in ("bound", "sample_em", "all_fail")}
    if not iteration:
        return row
    row |= {**history.facts("weigh"), **history.facts("fit")}
    if setting.arm.learns == "em" and row["steps"]:
        row["gap"] = float(np.mean([found["gap"] for found in history.rows("gap")]))
        check_q_gain(row["gap"], setting.config.em.min_q_gain, f"iteration {iteration}", "em.epochs")
    return row
