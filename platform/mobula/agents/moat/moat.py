"""MOAT: joint alignment of a planner pi_p and a grounder pi_g (Zhu et al. 2025, arXiv 2509.09629).

An iteration, for tasks x with gold actions a* and tools I::

    sample    S_x = {s_1 .. s_K} ~ pi_p(. | x)
    score     nll(s) = -1/|a*| sum_i log pi_g(a*_i | a*_<i, x, I, s)        log PPL; the reward is -PPL(s)
    pair      s_w = argmin nll, s_l = argmax nll, kept if nll(s_l) - nll(s_w) >= margin
    dpo       L_p = -E log sigmoid(beta [log pi_p(s_w|x)/pi_ref(s_w|x) - log pi_p(s_l|x)/pi_ref(s_l|x)])
                    + lambda E[-log pi_p(s_w|x) / |s_w|]                    pi_ref: pi_p as the iteration begins
    plans     s' ~ pi_p (the new one)
    ground    a' ~ pi_g(. | x, I, s'), accepted, corrected or dropped by a critic
    sft       L_g = -E sum_i log pi_g(a'_i | a'_<i, x, I, s'), mixed with the gold rows (replay)

After either training, J(pi_p, pi_g) = E_x E_{s ~ pi_p} [-nll(s)] on the probe tasks and success on the dev tasks say
whether it is kept (:mod:`mobula.agents.gate`; without the gate, the paper's setting, it always is). Other arms of the
comparison leave parts out or train on something else: :mod:`.baselines`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mobula.agents.moat import baselines
from mobula.agents.moat.agents import Job, TaskWorker, ground, propose, score
from mobula.agents.moat.candidates import PlanSample
from mobula.agents.moat.config import Arm
from mobula.agents.moat.critic import CriticSettings, canary_facts
from mobula.agents.moat.data import VERDICTS
from mobula.agents.moat.stage import (
    PREFERENCES,
    ArmContext,
    Checkpoint,
    Stage,
    Training,
    current_checkpoint,
    measured,
    measured_checkpoint,
    preferences_file,
    sft,
    task_items,
)
from mobula.agents.moat.start import fresh
from mobula.agents.moat.verifier import LabelledProgram, gold_cases, verifier_pairs
from mobula.alternation import Context, History, Loop, Phase, Row, Sharded, Step, seed_of
from mobula.artifacts import write_json, write_jsonl
from mobula.config import digest
from mobula.experiment import identity
from mobula.models.causal import CausalModel
from mobula.models.dpo import DpoTask, Preference
from mobula.models.endpoint import total_usage
from mobula.models.finetune import MODEL, finetune
from mobula.models.language_model import Sampling

CANARIES = 20  # known-bad programs an iteration


def moat_loop(arm: ArmContext) -> Loop:
    """The phases of an arm."""
    begin = [*measured(arm, "start", lambda history: (arm.planner, arm.grounder)), Step("begin", partial(_begin, arm))]
    if arm.arm.grounder == "criticised" and arm.critic.kind == "verifier":
        begin += _verifier(arm)
    phases, canaries = _candidates(arm), Step("canaries", partial(_canaries, arm))
    for stage in stages(arm.arm):
        if stage.agent == "grounder" and arm.arm.grounder == "criticised":
            phases += [canaries, _propose(arm, "plans", arm.config.moat.plans_per_task), _ground(arm, "plans")]
        phases += stage.phases(arm)
    decides = [identity(arm.config), asdict(arm.arm), arm.seed]
    return Loop(digest(decides), begin, phases, partial(_measure, arm))


def stages(arm: Arm) -> list[Stage]:
    """The stages of an iteration of an arm, by what its agents learn."""
    # ``prefer`` and ``improve`` are older names, kept in the seeds: results on record stay reproducible.
    learns_pairs = arm.planner in ("preferred", "random")
    planner = {"preferred": _preferences, "random": _preferences, **baselines.PLANNER}
    grounder = {"criticised": _kept_programs, "solved": _kept_programs, **baselines.GROUNDER}
    built = []
    if arm.planner:
        name = "dpo" if learns_pairs else "planner_sft"
        built.append(Stage(name, "planner", "prefer", planner[arm.planner]))
    if arm.grounder:
        built.append(Stage("grounder_sft", "grounder", "improve", grounder[arm.grounder]))
    return built


def _begin(arm: ArmContext, context: Context) -> Row:
    measured_checkpoint(context.history, "start", arm.planner, arm.grounder).write(context.directory)
    return {}


# Candidates: sample, score, pair.


def _candidates(arm: ArmContext) -> list[Phase]:
    """Plans, and what the planner's stage needs to know of them."""
    sample, pair = _propose(arm, "sample", arm.config.moat.samples), Step("pair", partial(_pair, arm))
    scores = Sharded("score", partial(_plan_items, arm, "sample", "align"), partial(_worker, arm, score), size=256)
    return {
        "preferred": [sample, scores, pair],
        "best": [sample, scores, pair],
        "random": [sample, pair],
        "solved": [Step("canaries", partial(_canaries, arm)), sample, _ground(arm, "sample")],
    }.get(arm.arm.planner, [])


def _propose(arm: ArmContext, name: str, samples: int, split: str = "align") -> Phase:
    job = partial(propose, samples=samples, sampling=arm.proposing)
    return Sharded(name, lambda context: task_items(arm.data.tasks[split]), partial(_worker, arm, job), size=32)


def _worker(arm: ArmContext, job: Job, context: Context) -> TaskWorker:
    """The current agents at a job."""
    return TaskWorker(arm.current_agents(context.history), job)


def _usable(arm: ArmContext, history: History, phase: str) -> list[PlanSample]:
    samples = [PlanSample(**row) for row in history.rows(phase)]
    return [sample for sample in samples if sample.usable(arm.config.moat.max_leak)]


def _plan_items(arm: ArmContext, phase: str, split: str, context: Context) -> list[Row]:
    tasks = arm.data.by_id(split)
    usable = _usable(arm, context.history, phase)
    return [{"task": asdict(tasks[s.task_id]), "j": s.j, "text": s.text} for s in usable]


@dataclass(frozen=True)
class Pair:
    """Two plans of one task of which the grounder finds the gold actions likelier under ``chosen``.

    Negative log-likelihoods are per token of the gold actions, in nats.
    """

    task_id: str
    chosen: PlanSample
    rejected: PlanSample
    nll_chosen: float
    nll_rejected: float

    @property
    def margin(self) -> float:
        """By how much ``chosen`` is better, nats per token."""
        return self.nll_rejected - self.nll_chosen


def preferred(samples: Sequence[PlanSample], nll: Sequence[float], margin: float, most: int = 1) -> list[Pair]:
    """Pairs of one task's usable samples: the best against the worst, then the second best against the second worst.

    ``nll`` aligns with ``samples``. A pair must be ``margin`` nats per token apart; at most ``most`` pairs are made.
    """
    order = sorted(range(len(samples)), key=lambda i: (nll[i], samples[i].j))
    pairs = []
    for rank in range(min(most, len(order) // 2)):
        best, worst = order[rank], order[-1 - rank]
        if nll[worst] - nll[best] < margin:
            break
        pairs.append(Pair(samples[best].task_id, samples[best], samples[worst], nll[best], nll[worst]))
    return pairs


def _pair(arm: ArmContext, context: Context) -> Row:
    """One pair a task (or a few)."""
    moat, at_random = arm.config.moat, arm.arm.planner == "random"
    usable = _usable(arm, context.history, "sample")
    scores = [] if at_random else context.history.rows("score")
    nll = {(row["task_id"], row["j"]): row["nll_mean"] for row in scores}
    if at_random:
        nll = baselines.random_ranks(usable, context.seed)
    by_task: dict[str, list[PlanSample]] = {}
    for sample in usable:
        by_task.setdefault(sample.task_id, []).append(sample)
    pairs = [
        pair
        for id, samples in by_task.items()
        for pair in preferred(
            samples, [nll[id, s.j] for s in samples], 0.0 if at_random else moat.margin, moat.pairs_per_prompt
        )
    ]
    write_json(context.directory / "pairs.json", [asdict(pair) for pair in pairs])
    tasks, (model, template) = arm.data.by_id("align"), arm.current_agents(context.history).planning
    rows = [
        Preference(
            template.plan(tasks[pair.task_id]),
            *([*model.encode(plan.text), model.eos] for plan in (pair.chosen, pair.rejected)),
        )
        for pair in pairs
    ]
    write_jsonl(context.directory / PREFERENCES, map(asdict, rows))
    facts: Row = {"n_pairs": len(pairs)}
    return facts if at_random or not pairs else {**facts, "margin": float(np.median([p.margin for p in pairs]))}


# Stage 1: direct preference optimisation of the planner.


def _preferences(arm: ArmContext, context: Context, checkpoint: Checkpoint) -> Training | str:
    """Chosen plans against rejected ones; nothing with too few pairs."""
    path = preferences_file(arm, context)
    if isinstance(path, str):
        return path
    task = DpoTask(checkpoint.planner, path, arm.config.moat.beta, arm.config.moat.chosen_nll)
    return Training(task, arm.config.dpo, after=partial(_chosen_shift, task))


def _chosen_shift(task: DpoTask, folder: Path) -> Row:
    """How much likelier chosen plans are under a trained planner than under the reference, in nats."""
    prompts, chosen = [pair.prompt for pair in task.items], [pair.chosen for pair in task.items]
    reference, now = (model.log_probs(prompts, chosen) for model in (task.open(), CausalModel.open(str(folder))))
    return {"chosen_lp_shift": float(np.mean([float(b.sum() - a.sum()) for a, b in zip(reference, now, strict=True)]))}


# Stage 2: the grounder acts on the planner's plans, and learns what the critic leaves of that.


def _canaries(arm: ArmContext, context: Context) -> Row:
    """Known-bad programs before the critic, other ones in every iteration."""
    align = list(arm.data.tasks["align"])
    tasks = random.Random(context.seed).sample(align, min(CANARIES, len(align)))
    return canary_facts(_critic(arm, context.history), arm.data.worlds, tasks)


def _critic(arm: ArmContext, history: History) -> CriticSettings:
    """The arm's critic, with the verifier that was trained at the start if it is one."""
    directory = history.latest("verifier")
    return arm.critic if directory is None else replace(arm.critic, verifier=directory / MODEL)


def _ground(arm: ArmContext, plans: str) -> Phase:
    """Programs for the plans that a phase proposed, judged."""
    moat = arm.config.moat
    sampling = Sampling(moat.max_program, moat.ground_temperature, moat.top_p)
    return _programs(arm, plans, "ground", "align", sampling, partial(_critic, arm))


def _programs(
    arm: ArmContext, plans: str, name: str, split: str, sampling: Sampling, critic: Callable[[History], CriticSettings]
) -> Phase:
    def worker(context: Context) -> TaskWorker:
        return _worker(arm, partial(ground, sampling=sampling, critic=critic(context.history)), context)

    return Sharded(name, partial(_plan_items, arm, plans, split), worker, size=64)


def _kept_programs(arm: ArmContext, context: Context, checkpoint: Checkpoint) -> Training | str:
    """What the critic left of the programs for the planner's own plans, and the gold ones."""
    tasks, model = arm.data.by_id("align"), CausalModel.open(str(checkpoint.grounder))
    kept = [row for row in context.history.rows("ground") if row["used_actions"] is not None]
    pairs = arm.data.grounding(model, [(tasks[r["task_id"]], r["plan"], r["used_actions"]) for r in kept])
    gold = arm.data.gold_programs(model) if arm.config.moat.replay else []
    return sft(arm, context, checkpoint.grounder, [*pairs, *gold], from_critic=len(pairs))


def _verifier(arm: ArmContext) -> list[Phase]:
    """Programs of the independent agents for training tasks, and a verifier that has learned which are right."""
    moat = arm.config.moat
    # As varied as plans are: at the low temperature of training rows there would be few errors to learn from.
    varied = Sampling(moat.max_program, moat.temperature, moat.top_p)

    def train(context: Context) -> Row:
        tasks = arm.data.by_id("train")
        written = [
            LabelledProgram(tasks[row["task_id"]], row["plan"], row["generated"], row["right"])
            for row in context.history.rows("verifier-programs")
            if row["status"] == "ok"
        ]
        programs = [*written, *gold_cases(arm.data.worlds, arm.data.tasks["train"])]
        rows, tokenizer = partial(verifier_pairs, programs=programs), arm.data.tokenizer(*VERDICTS)
        task = fresh(arm.config, rows, tokenizer, context.directory, seed_of(arm.seed, "verifier"))
        seed = context.seed
        finetune(task, arm.config.sft, context.directory, seed=seed, name="verifier", cluster=context.cluster)
        return {"written": len(written), "right": sum(program.right for program in written)}

    return [
        _propose(arm, "verifier-plans", moat.plans_per_task, "train"),
        _programs(
            arm, "verifier-plans", "verifier-programs", "train", varied, lambda history: CriticSettings("execution")
        ),
        Step("verifier", train),
    ]


# The metrics of an iteration.


def _measure(arm: ArmContext, history: History, iteration: int) -> Row:
    """The current agents' scores, and how the iteration's phases went."""
    checkpoint = current_checkpoint(history)
    scores, families = checkpoint.scores, np.array([task.family for task in arm.data.tasks["dev"]])
    row: Row = {
        "J": float(scores.surrogate.mean()),
        "dev_success": float(scores.success.mean()),
        **{f"dev_{f}": float(scores.success[families == f].mean()) for f in dict.fromkeys(families.tolist())},
        "leak_rate": scores.leak_rate,
        "parse_rate": scores.parse_rate,
        "gap_nll": float(checkpoint.gap.mean()),
    }
    if iteration == 0:
        return row
    this = history.only(iteration)
    if this.ran("sample"):
        row["dup_rate"] = float(np.mean([sample["duplicate_of"] is not None for sample in this.rows("sample")]))
    if this.ran("pair"):
        row |= this.facts("pair")
    if this.ran("ground"):
        groundings = this.rows("ground")
        row |= this.facts("canaries")
        row |= _critic_rates(groundings)
        row["critic_usage"] = total_usage([row["critic_usage"], *(grounding["usage"] for grounding in groundings)])
    return {**row, **stage_facts(arm, this)}


def _critic_rates(groundings: Sequence[Row]) -> Row:
    """How often the critic accepted, corrected and dropped, and how well accepting agrees with execution."""
    verdicts = [grounding["verdict"] for grounding in groundings]
    rates: Row = {f"critic_{v}": verdicts.count(v) / max(1, len(verdicts)) for v in ("accept", "correct", "drop")}
    accepted = [grounding["right"] for grounding in groundings if grounding["verdict"] == "accept"]
    right = [grounding["verdict"] == "accept" for grounding in groundings if grounding["right"]]
    rates |= {"critic_precision": float(np.mean(accepted))} if accepted else {}
    return rates | ({"critic_recall": float(np.mean(right))} if right else {})


def stage_facts(arm: ArmContext, this: History) -> Row:
    """How the gate decided on the stages, what each trained last, accepted or not, and the target tokens learned."""
    gate: dict[str, bool | None] = {}
    facts: Row = {"gate": gate, "J_stages": {}, "dev_stages": {}, "tokens": 0}
    for stage in stages(arm.arm):
        attempts = stage.attempts(this)
        trained = [row for row in attempts if row["accepted"] is not None]
        facts["tokens"] += stage.tokens(this)
        gate[stage.name] = trained[-1]["accepted"] if trained else None
        if trained:
            facts["J_stages"][stage.name] = trained[-1]["J"]
            facts["dev_stages"][stage.name] = trained[-1]["dev_success"]
        if attempts and "chosen_lp_shift" in attempts[0]:
            facts["chosen_lp_shift"] = attempts[0]["chosen_lp_shift"]
    # An arm with a budget that stopped where its stages were rejected would spend less than it.
    return {**facts, "stop": not arm.arm.budget_matched and not any(gate.values())}
