"""MOAT as phases of the alternation driver.

An iteration proposes plans, pairs them by how likely they make the gold actions, tunes the planner on the pairs, lets
the grounder act on the new planner's plans, and fine-tunes it on what the critic leaves. After each stage the gate
compares what has come of it with what stood before, on the same probe and dev tasks.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mobula.agents.gate import Standing, decide
from mobula.agents.language import parse
from mobula.agents.moat.candidates import PlanSample, preferred
from mobula.agents.moat.config import Arm, Config
from mobula.agents.moat.critic import CriticSettings, canary_rate
from mobula.agents.moat.preference import DpoTask, Preference, write_preferences
from mobula.agents.moat.templates import template_of
from mobula.agents.moat.workers import Agents, GroundWorker, PlanWorker, ProbeWorker, ScoreWorker, SolveWorker
from mobula.agents.worlds import GROUNDER_STYLES, PLANNER_STYLES, Task, World
from mobula.alternation import Context, History, Loop, Phase, Row, Sharded, Step, seed_of
from mobula.artifacts import write_json
from mobula.config import digest
from mobula.environment import secret
from mobula.errors import ConfigError
from mobula.experiment import identity
from mobula.models.causal import CausalModel, Sampling
from mobula.models.sft import Pair, SftTask, write_pairs
from mobula.training import FitResult, TrainingConfig, fit, load_weights
from mobula.training import Task as Trainable

STATE, MODEL = "state.json", "model"
CANARIES = 20  # known-bad programs an iteration


@dataclass(frozen=True)
class Setting:
    """What all phases of one arm and seed share: the tasks, the worlds, and the agents of stage 0."""

    config: Config
    arm: Arm
    tasks: Mapping[str, Sequence[Task]]
    worlds: Mapping[str, World]
    planner: Path
    grounder: Path
    seed: int

    def agents(self, planner: Path, grounder: Path) -> Agents:
        """A planner and a grounder in these worlds."""
        view: Any = self.config.moat.grounder_view
        return Agents(planner, grounder, self.config.tasks.seed, view)

    @property
    def critic(self) -> CriticSettings:
        """Who judges in this arm."""
        moat = self.config.moat
        kind = self.arm.critic or moat.critic
        return CriticSettings(kind, moat.noise, self.seed, moat.critic_url, moat.critic_model, self._critic_key())

    def _critic_key(self) -> str:
        variable = self.config.moat.critic_key
        key = secret(variable) if variable else ""
        if key is None:
            raise ConfigError(f"moat.critic_key: the environment variable {variable} is not set")
        return key

    @property
    def proposing(self) -> Sampling:
        """How plans are proposed."""
        moat = self.config.moat
        return Sampling(moat.max_plan, moat.temperature, moat.top_p)


@dataclass(frozen=True)
class State:
    """The agents that stand, and how."""

    planner: Path
    grounder: Path
    standing: Standing

    @classmethod
    def latest(cls, history: History) -> State:
        """What the last gate left."""
        directory = next(d for _, _, d in reversed(history.finished) if (d / STATE).is_file())
        return cls.read(directory / STATE)

    @classmethod
    def read(cls, path: Path) -> State:
        """What :meth:`write` wrote."""
        row = json.loads(path.read_text())
        arrays = (np.array(row["surrogate"]), np.array(row["success"]))
        root = path.parent
        standing = Standing(*arrays, row["leak_rate"], row["parse_rate"])
        return cls((root / row["planner"]).resolve(), (root / row["grounder"]).resolve(), standing)

    def write(self, directory: Path) -> None:
        """Leave it in a phase's directory; paths are relative, so a run can be moved."""
        row = {
            "planner": _relative(self.planner, directory),
            "grounder": _relative(self.grounder, directory),
            "surrogate": self.standing.surrogate.tolist(),
            "success": self.standing.success.tolist(),
            "leak_rate": self.standing.leak_rate,
            "parse_rate": self.standing.parse_rate,
        }
        write_json(directory / STATE, row)


def moat_loop(setting: Setting) -> Loop:
    """The phases of an arm."""
    start = [*_measured(setting, "start", lambda history: (setting.planner, setting.grounder)), _begin(setting)]
    phases: list[Phase] = []
    if setting.arm.prefer:
        phases += [_propose(setting, "sample", setting.config.moat.samples), _score(setting), _pair(setting)]
        phases += _stage(setting, "prefer", _train_planner)
    if setting.arm.improve:
        phases += [_canaries(setting), _propose(setting, "plans", setting.config.moat.plans_per_task), _ground(setting)]
        phases += _stage(setting, "improve", _train_grounder)
    decides = [identity(setting.config), asdict(setting.arm), setting.seed]
    return Loop(digest(decides), start, phases, lambda history, iteration: _row(setting, history, iteration))


def planner_pairs(setting: Setting, model: CausalModel) -> list[Pair]:
    """Task to gold plan, of the train split."""
    template = template_of(model, setting.config.moat.grounder_view)  # type: ignore[arg-type]
    return [(template.plan(task), [*model.encode(str(task.gold_plan)), model.eos]) for task in setting.tasks["train"]]


def grounder_pairs(setting: Setting, model: CausalModel) -> list[Pair]:
    """Gold plan to gold actions, of the train split, the plans in the words of the grounder's annotators."""
    styles = GROUNDER_STYLES if setting.config.tasks.style_mismatch else PLANNER_STYLES
    rows = []
    for task in setting.tasks["train"]:
        program = parse(str(task.gold_actions))
        plan = setting.worlds[task.family].plan(program, styles, random.Random(f"grounder {task.id}"))
        rows.append((task, plan, str(task.gold_actions)))
    return grounding_pairs(setting, model, rows)


def grounding_pairs(setting: Setting, model: CausalModel, rows: Sequence[tuple[Task, str, str]]) -> list[Pair]:
    """(task, plan, actions) as the grounder is trained on them."""
    template = template_of(model, setting.config.moat.grounder_view)  # type: ignore[arg-type]
    found = []
    for task, plan, actions in rows:
        tools = list(setting.worlds[task.family].tools().values())
        found.append((template.ground(task, plan, tools), [*model.encode(actions), model.eos]))
    return found


def tune(task: Trainable, config: TrainingConfig, start: Path, directory: Path, seed: int, name: str) -> FitResult:
    """Train from the model in ``start`` and save what came of it in ``directory/model``."""
    result = fit(task, config, directory / "fit", seed=seed % 2**31, name=name)
    model = CausalModel.open(str(start))
    load_weights(model.network, result.weights)
    model.save(directory / MODEL)
    return result


def _items(tasks: Sequence[Task]) -> list[Row]:
    return [{"task": asdict(task)} for task in tasks]


def _propose(setting: Setting, name: str, count: int) -> Phase:
    def worker(context: Context) -> PlanWorker:
        state = State.latest(context.history)
        agents = setting.agents(state.planner, state.grounder)
        return PlanWorker(agents, count, setting.proposing, context.iteration)

    return Sharded(name, lambda context: _items(setting.tasks["align"]), worker, size=32)


def _score(setting: Setting) -> Phase:
    """The gold actions' likelihood under every usable plan, by the grounder that stands."""
    by_id = {task.id: task for task in setting.tasks["align"]}

    def items(context: Context) -> list[Row]:
        usable = _usable(setting, context.history, "sample")
        return [{"task": asdict(by_id[s.task_id]), "j": s.j, "text": s.text} for s in usable]

    def worker(context: Context) -> ScoreWorker:
        state = State.latest(context.history)
        return ScoreWorker(setting.agents(state.planner, state.grounder))

    return Sharded("score", items, worker, size=256)


def _usable(setting: Setting, history: History, phase: str) -> list[PlanSample]:
    samples = [PlanSample(**row) for row in history.rows(phase)]
    return [sample for sample in samples if sample.usable(setting.config.moat.max_leak)]


def _pair(setting: Setting) -> Phase:
    """One pair a task (or a few), with the reference's log-probabilities of both plans."""
    by_id = {task.id: task for task in setting.tasks["align"]}
    moat = setting.config.moat

    def run(context: Context) -> Row:
        nll = {(row["task_id"], row["j"]): row["nll_mean"] for row in context.history.rows("score")}
        usable: dict[str, list[PlanSample]] = {}
        for sample in _usable(setting, context.history, "sample"):
            usable.setdefault(sample.task_id, []).append(sample)
        pairs = [
            pair
            for id, samples in usable.items()
            for pair in preferred(samples, [nll[id, s.j] for s in samples], moat.margin, moat.pairs_per_prompt)
        ]
        model, template = setting.agents(State.latest(context.history).planner, setting.grounder).planning
        prompts = [template.plan(by_id[pair.task_id]) for pair in pairs]
        chosen = [[*model.encode(pair.chosen.text), model.eos] for pair in pairs]
        rejected = [[*model.encode(pair.rejected.text), model.eos] for pair in pairs]
        sums = [float(s.sum()) for s in model.log_probs([*prompts, *prompts], [*chosen, *rejected])] if pairs else []
        rows = [
            Preference(tuple(prompts[i]), tuple(chosen[i]), tuple(rejected[i]), sums[i], sums[len(pairs) + i])
            for i in range(len(pairs))
        ]
        write_preferences(context.directory / "preferences.jsonl", rows)
        write_json(context.directory / "pairs.json", [asdict(pair) for pair in pairs])
        margins = [pair.margin for pair in pairs]
        return {"n_pairs": len(pairs), "margin": float(np.median(margins)) if pairs else 0.0}

    return Step("pair", run)


def _canaries(setting: Setting) -> Phase:
    """Known-bad programs before the critic, other ones in every iteration."""

    def run(context: Context) -> Row:
        every = list(setting.tasks["align"])
        tasks = random.Random(context.seed).sample(every, min(CANARIES, len(every)))
        return {"canary_rate": canary_rate(setting.critic, setting.worlds, tasks)}

    return Step("canaries", run)


def _ground(setting: Setting) -> Phase:
    """Programs for the standing planner's plans, judged."""
    by_id = {task.id: task for task in setting.tasks["align"]}
    moat, critic = setting.config.moat, setting.critic

    def items(context: Context) -> list[Row]:
        usable = _usable(setting, context.history, "plans")
        return [{"task": asdict(by_id[s.task_id]), "j": s.j, "text": s.text} for s in usable]

    def worker(context: Context) -> GroundWorker:
        state = State.latest(context.history)
        agents = setting.agents(state.planner, state.grounder)
        sampling = Sampling(moat.max_program, moat.ground_temperature, moat.top_p)
        return GroundWorker(agents, sampling, critic)

    return Sharded("ground", items, worker, size=64)


Train = Callable[[Setting, Context, State, float], tuple[Path | None, Row]]


def _train_planner(setting: Setting, context: Context, state: State, scale: float) -> tuple[Path | None, Row]:
    """Preference tuning; nothing with too few pairs."""
    found = context.history.facts("pair")["n_pairs"]
    if found < setting.config.moat.fewest_pairs:
        return None, {"skipped": f"{found} pairs"}
    data = context.history.latest("pair")
    assert data is not None
    task = DpoTask(state.planner, data / "preferences.jsonl", setting.config.moat.beta, setting.config.moat.chosen_nll)
    config = replace(setting.config.prefer, lr=setting.config.prefer.lr * scale)
    result = tune(task, config, state.planner, context.directory, context.seed, "prefer")
    model = CausalModel.open(str(context.directory / MODEL))
    pairs = task.preferences
    now = [float(s.sum()) for s in model.log_probs([p.prompt for p in pairs], [p.chosen for p in pairs])]
    shift = float(np.mean([after - p.ref_chosen for after, p in zip(now, pairs, strict=True)]))
    return context.directory / MODEL, {"steps": result.steps, "chosen_lp_shift": shift}


def _train_grounder(setting: Setting, context: Context, state: State, scale: float) -> tuple[Path | None, Row]:
    """Fine-tuning on what the critic left, and on the gold rows."""
    by_id = {task.id: task for task in setting.tasks["align"]}
    rows = context.history.rows("ground")
    kept = [
        (by_id[row["task_id"]], row["plan"], row["used_actions"]) for row in rows if row["used_actions"] is not None
    ]
    model = CausalModel.open(str(state.grounder))
    pairs = grounding_pairs(setting, model, kept)
    if setting.config.moat.replay:
        pairs += grounder_pairs(setting, model)
    if not pairs:
        return None, {"skipped": "nothing to learn"}
    write_pairs(context.directory / "pairs.jsonl", pairs)
    config = replace(setting.config.improve, lr=setting.config.improve.lr * scale)
    task = SftTask(state.grounder, context.directory / "pairs.jsonl")
    result = tune(task, config, state.grounder, context.directory, context.seed, "improve")
    return context.directory / MODEL, {"steps": result.steps, "rows": len(pairs), "from_critic": len(kept)}


def _stage(setting: Setting, name: str, train: Train) -> list[Phase]:
    """Train, measure, decide; and again with a third of the learning rate if that was rejected."""
    phases: list[Phase] = []
    for attempt in range(1 + setting.config.gate.retries):
        label = f"{name}-{attempt}"
        phases.append(Step(label, _trainer(setting, name, attempt, train)))
        phases += _measured(setting, label, _candidate(name, label))
        phases.append(Step(f"{label}-gate", _gate(setting, name, label)))
    return phases


def _trainer(setting: Setting, name: str, attempt: int, train: Train) -> Callable[[Context], Row]:
    def run(context: Context) -> Row:
        if attempt and context.history.facts(f"{name}-{attempt - 1}-gate")["accepted"] is not False:
            return {"trained": False}
        model, facts = train(setting, context, State.latest(context.history), 3.0**-attempt)
        return {"trained": model is not None, **facts}

    return run


def _candidate(name: str, label: str) -> Callable[[History], tuple[Path, Path] | None]:
    """Planner and grounder with the one that was just trained; None if none was."""

    def find(history: History) -> tuple[Path, Path] | None:
        directory = history.latest(label)
        if directory is None or not history.facts(label)["trained"]:
            return None
        state = State.latest(history)
        new = directory / MODEL
        return (new, state.grounder) if name == "prefer" else (state.planner, new)

    return find


def _measured(setting: Setting, label: str, candidate: Callable[[History], tuple[Path, Path] | None]) -> list[Phase]:
    """The surrogate on the probe tasks and success on the dev tasks; nothing where there is no candidate."""
    moat = setting.config.moat
    # The same draws after every stage, so that differences are those of the agents.
    probes = [
        {"task": asdict(task), "seed": seed_of(setting.seed, "probe", task.id)} for task in setting.tasks["probe"]
    ]

    def agents(context: Context) -> Agents:
        found = candidate(context.history)
        assert found is not None
        return setting.agents(*found)

    def only(items: list[Row]) -> Callable[[Context], list[Row]]:
        return lambda context: items if candidate(context.history) is not None else []

    return [
        Sharded(f"{label}-probe", only(probes), lambda c: ProbeWorker(agents(c), setting.proposing), size=100),
        Sharded(
            f"{label}-dev",
            only(_items(setting.tasks["dev"])),
            lambda c: SolveWorker(agents(c), moat.max_plan, moat.max_program),
            size=100,
        ),
    ]


def _standing(history: History, label: str) -> Standing:
    probes, solved = history.rows(f"{label}-probe"), history.rows(f"{label}-dev")
    return Standing(
        np.array([-row["nll_mean"] for row in probes]),
        np.array([row["success"] for row in solved]),
        float(np.mean([row["leaks"] for row in probes])),
        float(np.mean([row["parsed"] for row in probes])),
    )


def _begin(setting: Setting) -> Phase:
    def run(context: Context) -> Row:
        State(setting.planner, setting.grounder, _standing(context.history, "start")).write(context.directory)
        return {}

    return Step("begin", run)


def _gate(setting: Setting, name: str, label: str) -> Callable[[Context], Row]:
    families = [task.family for task in setting.tasks["dev"]]

    def run(context: Context) -> Row:
        found = _candidate(name, label)(context.history)
        if found is None:
            return {"accepted": None, "reasons": []}
        before, after = State.latest(context.history), _standing(context.history, label)
        decision = decide(setting.config.gate, before.standing, after, families)
        if decision.accepted:
            State(*found, after).write(context.directory)
        return {
            "accepted": decision.accepted,
            "reasons": decision.reasons,
            "J": float(after.surrogate.mean()),
            "dev_success": float(after.success.mean()),
        }

    return run


def _row(setting: Setting, history: History, iteration: int) -> Row:
    """The metrics of an iteration: how the agents stand, and what its phases were like."""
    state = State.latest(history)
    families = np.array([task.family for task in setting.tasks["dev"]])
    row: Row = {
        "J": float(state.standing.surrogate.mean()),
        "dev_success": float(state.standing.success.mean()),
        **{f"dev_{f}": float(state.standing.success[families == f].mean()) for f in dict.fromkeys(families.tolist())},
        "leak_rate": state.standing.leak_rate,
        "parse_rate": state.standing.parse_rate,
    }
    if iteration == 0:
        return row
    gates = []
    if setting.arm.prefer:
        samples = history.rows("sample")
        row["dup_rate"] = float(np.mean([sample["duplicate_of"] is not None for sample in samples]))
        row |= history.facts("pair")
        row["chosen_lp_shift"] = history.facts("prefer-0").get("chosen_lp_shift", 0.0)
        gates.append("prefer")
    if setting.arm.improve:
        verdicts = [grounding["verdict"] for grounding in history.rows("ground")]
        row |= history.facts("canaries")
        row |= {f"critic_{v}": verdicts.count(v) / max(1, len(verdicts)) for v in ("accept", "correct", "drop")}
        gates.append("improve")
    outcomes = [
        [history.facts(f"{gate}-{attempt}-gate") for attempt in range(1 + setting.config.gate.retries)]
        for gate in gates
    ]
    tried = [[facts for facts in found if facts["accepted"] is not None] for found in outcomes]
    row["gate"] = {gate: found[-1]["accepted"] if found else None for gate, found in zip(gates, tried, strict=True)}
    row["J_stages"] = {g: found[-1]["J"] for g, found in zip(gates, tried, strict=True) if found}
    row["stop"] = not any(row["gate"].values())
    return row


def _relative(path: Path, directory: Path) -> str:
    return os.path.relpath(path.resolve(), directory.resolve())
