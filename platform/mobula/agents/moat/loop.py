"""MOAT as phases of the alternation driver.

An iteration proposes plans, pairs them by how likely they make the gold actions, tunes the planner on the pairs, lets
the grounder act on the new planner's plans, and fine-tunes it on what the critic leaves. After each stage the gate
compares what has come of it with what stood before, on the same probe and dev tasks. Other arms of the comparison leave
parts out or train on something else: :mod:`.stages`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mobula.agents.gate import Standing, decide
from mobula.agents.moat.candidates import PlanSample, preferred
from mobula.agents.moat.critic import CriticSettings, canary_rate
from mobula.agents.moat.preference import DpoTask, Preference, write_preferences
from mobula.agents.moat.setting import MODEL, Setting, State
from mobula.agents.moat.stages import GROUNDER, PLANNER, Prepare, chosen_shift, steps_for, tune
from mobula.agents.moat.start import fresh, world_texts
from mobula.agents.moat.templates import VERDICTS
from mobula.agents.moat.verifier import Judged, gold_cases, verifier_pairs
from mobula.agents.moat.workers import Agents, GroundWorker, PlanWorker, ProbeWorker, ScoreWorker, SolveWorker
from mobula.agents.worlds import Task
from mobula.alternation import DONE, Context, History, Loop, Phase, Row, Sharded, Step, seed_of
from mobula.artifacts import write_json
from mobula.config import digest
from mobula.experiment import identity
from mobula.models.causal import Sampling, word_tokenizer

CANARIES = 20  # known-bad programs an iteration


def moat_loop(setting: Setting) -> Loop:
    """The phases of an arm."""
    arm = setting.arm
    start = [*_measured(setting, "start", lambda history: (setting.planner, setting.grounder)), _begin(setting)]
    if arm.grounder == "criticised" and setting.critic.kind == "verifier":
        start += _verifier(setting)
    phases: list[Phase] = [*_before_planner(setting)]
    if arm.planner:
        phases += _stage(setting, "prefer", PLANNER[arm.planner])
    if arm.grounder == "criticised":
        phases += [_canaries(setting), _propose(setting, "plans", setting.config.moat.plans_per_task)]
        phases += [_ground(setting, "plans", "ground")]
    if arm.grounder:
        phases += _stage(setting, "improve", GROUNDER[arm.grounder])
    decides = [identity(setting.config), asdict(arm), setting.seed]
    return Loop(digest(decides), start, phases, lambda history, iteration: _row(setting, history, iteration))


def spent(directory: Path, iteration: int, stage: str) -> int:
    """The target tokens that a stage of another arm has learned from in an iteration, rejected attempts included."""
    trained = re.compile(rf"\d+-{stage}-\d+")
    places = (directory / f"iteration-{iteration:03}").glob(f"*/{DONE}")
    return sum(json.loads(p.read_text())["facts"]["tokens"] for p in places if trained.fullmatch(p.parent.name))


def _before_planner(setting: Setting) -> list[Phase]:
    """What the planner's stage learns from."""
    sample = _propose(setting, "sample", setting.config.moat.samples)
    return {
        "preferred": [sample, _score(setting), _pair(setting, _scored)],
        "best": [sample, _score(setting), _pair(setting, _scored)],
        "random": [sample, _pair(setting, _by_chance)],
        "solved": [_canaries(setting), sample, _ground(setting, "sample", "ground")],
    }.get(setting.arm.planner, [])


def _items(tasks: Sequence[Task]) -> list[Row]:
    return [{"task": asdict(task)} for task in tasks]


def _propose(setting: Setting, name: str, count: int, split: str = "align") -> Phase:
    def worker(context: Context) -> PlanWorker:
        state = State.latest(context.history)
        agents = setting.agents(state.planner, state.grounder)
        return PlanWorker(agents, count, setting.proposing, context.iteration)

    return Sharded(name, lambda context: _items(setting.tasks[split]), worker, size=32)


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


Nll = dict[tuple[str, int], float]


def _scored(context: Context, usable: Sequence[PlanSample]) -> Nll:
    return {(row["task_id"], row["j"]): row["nll_mean"] for row in context.history.rows("score")}


def _by_chance(context: Context, usable: Sequence[PlanSample]) -> Nll:
    """Ranks in place of scores: which plan is chosen and which is rejected is drawn."""
    order = random.Random(context.seed).sample(range(len(usable)), len(usable))
    return {(sample.task_id, sample.j): float(rank) for sample, rank in zip(usable, order, strict=True)}


def _pair(setting: Setting, scores: Callable[[Context, Sequence[PlanSample]], Nll]) -> Phase:
    """One pair a task (or a few), with the reference's log-probabilities of both plans."""
    by_id = {task.id: task for task in setting.tasks["align"]}
    moat, by_chance = setting.config.moat, scores is _by_chance

    def run(context: Context) -> Row:
        usable = _usable(setting, context.history, "sample")
        nll = scores(context, usable)
        by_task: dict[str, list[PlanSample]] = {}
        for sample in usable:
            by_task.setdefault(sample.task_id, []).append(sample)
        margin = 0.0 if by_chance else moat.margin
        pairs = [
            pair
            for id, samples in by_task.items()
            for pair in preferred(samples, [nll[id, s.j] for s in samples], margin, moat.pairs_per_prompt)
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
        facts: Row = {"n_pairs": len(pairs)}
        return facts if by_chance or not pairs else {**facts, "margin": float(np.median([p.margin for p in pairs]))}

    return Step("pair", run)


def _canaries(setting: Setting) -> Phase:
    """Known-bad programs before the critic, other ones in every iteration."""

    def run(context: Context) -> Row:
        every = list(setting.tasks["align"])
        tasks = random.Random(context.seed).sample(every, min(CANARIES, len(every)))
        return {"canary_rate": canary_rate(_critic(setting, context.history), setting.worlds, tasks)}

    return Step("canaries", run)


def _critic(setting: Setting, history: History) -> CriticSettings:
    """The arm's critic, with the verifier that was trained at the start if it is one."""
    directory = history.latest("verifier")
    return setting.critic if directory is None else replace(setting.critic, verifier=directory / MODEL)


def _ground(setting: Setting, plans: str, name: str) -> Phase:
    """Programs for the plans that a phase proposed, judged."""
    moat = setting.config.moat
    sampling = Sampling(moat.max_program, moat.ground_temperature, moat.top_p)
    return _programs(setting, plans, name, "align", sampling, lambda history: _critic(setting, history))


def _programs(
    setting: Setting,
    plans: str,
    name: str,
    split: str,
    sampling: Sampling,
    critic: Callable[[History], CriticSettings],
) -> Phase:
    by_id = {task.id: task for task in setting.tasks[split]}

    def items(context: Context) -> list[Row]:
        usable = _usable(setting, context.history, plans)
        return [{"task": asdict(by_id[s.task_id]), "j": s.j, "text": s.text} for s in usable]

    def worker(context: Context) -> GroundWorker:
        state = State.latest(context.history)
        agents = setting.agents(state.planner, state.grounder)
        return GroundWorker(agents, sampling, critic(context.history))

    return Sharded(name, items, worker, size=64)


def _verifier(setting: Setting) -> list[Phase]:
    """What the independent agents do on training tasks, right or wrong, and a verifier that has learned which."""
    moat, train = setting.config.moat, setting.tasks["train"]
    by_id = {task.id: task for task in train}
    # As varied as plans are: at the low temperature of training rows there would be few errors to learn from.
    varied = Sampling(moat.max_program, moat.temperature, moat.top_p)

    def learn(context: Context) -> Row:
        written = [
            Judged(by_id[row["task_id"]], row["plan"], row["generated"], row["right"])
            for row in context.history.rows("verifier-programs")
            if row["status"] == "ok"
        ]
        cases = [*written, *gold_cases(setting.worlds, train)]
        tokenizer = word_tokenizer([*world_texts(setting.worlds, setting.tasks), *VERDICTS])
        task = fresh(setting, lambda _, model: verifier_pairs(model, cases), tokenizer, context.directory, "verifier")
        tune(task, setting.config.stage0, context.directory, context.seed, "verifier")
        return {"written": len(written), "right": sum(case.right for case in written)}

    judge = CriticSettings("execution")
    return [
        _propose(setting, "verifier-plans", moat.plans_per_task, "train"),
        _programs(setting, "verifier-plans", "verifier-programs", "train", varied, lambda _: judge),
        Step("verifier", learn),
    ]


def _stage(setting: Setting, name: str, prepare: Prepare) -> list[Phase]:
    """Train, measure, decide; and again with a third of the learning rate if that was rejected."""
    phases: list[Phase] = []
    for attempt in range(1 + setting.gate.retries):
        label = f"{name}-{attempt}"
        phases.append(Step(label, _trainer(setting, name, attempt, prepare)))
        phases += _measured(setting, label, _candidate(name, label))
        phases.append(Step(f"{label}-gate", _gate(setting, name, label)))
    return phases


def _trainer(setting: Setting, name: str, attempt: int, prepare: Prepare) -> Callable[[Context], Row]:
    def skipped(reason: str) -> Row:
        return {"trained": False, "tokens": 0, "skipped": reason}

    def run(context: Context) -> Row:
        if attempt and context.history.facts(f"{name}-{attempt - 1}-gate")["accepted"] is not False:
            return skipped("nothing was rejected")
        prepared = prepare(setting, context, State.latest(context.history))
        if isinstance(prepared, str):
            return skipped(prepared)
        task, config = prepared.task, replace(prepared.config, lr=prepared.config.lr * 3.0**-attempt)
        if setting.budget is not None:
            tokens = spent(setting.budget, context.iteration, name)
            if tokens == 0:
                return skipped("the first arm trained nothing here")
            config = setting.config.matched
            config = replace(config, steps=steps_for(tokens, task, config.batch))
        result, tokens = tune(task, config, context.directory, context.seed, name)
        shift = {"chosen_lp_shift": chosen_shift(task, context.directory)} if isinstance(task, DpoTask) else {}
        return {"trained": True, "tokens": tokens, "steps": result.steps, **prepared.facts, **shift}

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
            lambda c: SolveWorker(agents(c), setting.most),
            size=100,
        ),
    ]


def _state(history: History, label: str, planner: Path, grounder: Path) -> State:
    """How two agents stand, from what was measured of them."""
    probes, solved = history.rows(f"{label}-probe"), history.rows(f"{label}-dev")
    standing = Standing(
        np.array([-row["nll_mean"] for row in probes]),
        np.array([row["success"] for row in solved]),
        float(np.mean([row["leaks"] for row in probes])),
        float(np.mean([row["parsed"] for row in probes])),
    )
    return State(planner, grounder, standing, np.array([row["nll_mean"] - row["nll_gold"] for row in probes]))


def _begin(setting: Setting) -> Phase:
    def run(context: Context) -> Row:
        _state(context.history, "start", setting.planner, setting.grounder).write(context.directory)
        return {}

    return Step("begin", run)


def _gate(setting: Setting, name: str, label: str) -> Callable[[Context], Row]:
    families = [task.family for task in setting.tasks["dev"]]

    def run(context: Context) -> Row:
        found = _candidate(name, label)(context.history)
        if found is None:
            return {"accepted": None}
        state = _state(context.history, label, *found)
        before, after = State.latest(context.history).standing, state.standing
        decision = decide(setting.gate, before, after, families)
        if decision.accepted:
            state.write(context.directory)
        return {
            "accepted": decision.accepted,
            "reasons": decision.reasons,
            "J": float(after.surrogate.mean()),
            "dev_success": float(after.success.mean()),
            "J_changes": (after.surrogate - before.surrogate).tolist(),
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
        "gap_nll": float(state.gap.mean()),
    }
    if iteration == 0:
        return row
    this = history.only(iteration)
    if this.ran("sample"):
        samples = this.rows("sample")
        row["dup_rate"] = float(np.mean([sample["duplicate_of"] is not None for sample in samples]))
    if this.ran("pair"):
        row |= this.facts("pair")
        row["chosen_lp_shift"] = this.facts("prefer-0").get("chosen_lp_shift", 0.0)
    if this.ran("ground"):
        row |= this.facts("canaries")
        row |= _critic_facts(this.rows("ground"))
    return {**row, **_decisions(setting, this)}


def _critic_facts(groundings: Sequence[Row]) -> Row:
    """How often the critic accepted, corrected and dropped, and how well accepting agrees with execution."""
    verdicts = [grounding["verdict"] for grounding in groundings]
    facts: Row = {f"critic_{v}": verdicts.count(v) / max(1, len(verdicts)) for v in ("accept", "correct", "drop")}
    accepted = [grounding["right"] for grounding in groundings if grounding["verdict"] == "accept"]
    right = [grounding["verdict"] == "accept" for grounding in groundings if grounding["right"]]
    if accepted:
        facts["critic_precision"] = float(np.mean(accepted))
    if right:
        facts["critic_recall"] = float(np.mean(right))
    return facts


def _decisions(setting: Setting, this: History) -> Row:
    """What became of the stages: how the gate decided, what each trained, and the target tokens learned from.

    ``J_stages`` and ``dev_stages`` are those of the last candidate, accepted or not.
    """
    stages = [name for name, trains in (("prefer", setting.arm.planner), ("improve", setting.arm.grounder)) if trains]
    gate: dict[str, bool | None] = {}
    trained: dict[str, dict[str, float]] = {"J_stages": {}, "dev_stages": {}}
    tokens = 0
    for stage in stages:
        labels = [f"{stage}-{attempt}" for attempt in range(1 + setting.gate.retries)]
        tokens += sum(this.facts(label)["tokens"] for label in labels)
        tried = [facts for facts in (this.facts(f"{label}-gate") for label in labels) if facts["accepted"] is not None]
        gate[stage] = tried[-1]["accepted"] if tried else None
        if tried:
            trained["J_stages"][stage], trained["dev_stages"][stage] = tried[-1]["J"], tried[-1]["dev_success"]
    # A matched arm that stopped where its stages were rejected would spend less than its budget.
    stop = not setting.arm.matched and not any(gate.values())
    return {"gate": gate, **trained, "tokens": tokens, "stop": stop}
