"""The config of a `moat` experiment: arms, data, model, one iteration, trainings, evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mobula.agents.gate import GateConfig
from mobula.agents.worlds import SOURCES, WorldSet
from mobula.alternation import AlternationConfig
from mobula.config import key, section
from mobula.models.endpoint import EndpointConfig
from mobula.models.finetune import BaseModelConfig
from mobula.models.memory import Step
from mobula.study import StudyConfig, System
from mobula.training import TrainingConfig

INDEPENDENT, UNGATED = "independent", "moat_no_gate"
CRITICS = ("executable", "execution", "oracle", "verifier", "llm", "noisy", "always_accept", "always_reject")


@dataclass(frozen=True)
class Arm:
    """What an arm of the comparison does in an iteration.

    ``planner``: what planners learn: ``preferred`` against rejected plans, pairs drawn at ``random``, the ``best`` plan
    as a target, plans that ``solved`` their task, the ``gold`` plans again, or nothing. ``grounder``: what a critic
    left of their own programs (``criticised``), programs that ``solved`` the task, the ``gold`` ones, or nothing.
    ``critic`` and ``noise``: who judges; empty: as configured. ``gate``: whether a stage can be rejected.
    ``max_iterations``: where it ends at the latest. ``against``: the arm that it is compared with; empty: the first.
    ``budget_matched``: agents whose training is as long as in the arm it is compared with, counted in target tokens.
    """

    planner: str = ""
    grounder: str = ""
    critic: str = ""
    noise: float = 0.0
    gate: bool = True
    max_iterations: int | None = None
    budget_matched: tuple[str, ...] = ()
    against: str = ""


def _ungated(planner: str, grounder: str, **changed: object) -> Arm:
    """A part of MOAT replaced, or all of it. Ungated: a gate would roll that back and measure another arm."""
    return Arm(planner, grounder, gate=False, against=UNGATED, **changed)  # type: ignore[arg-type]


ARMS = {
    "moat": Arm("preferred", "criticised"),
    UNGATED: Arm("preferred", "criticised", gate=False),
    "planner_only": _ungated("preferred", ""),
    "grounder_only": _ungated("", "criticised"),
    "no_critic": _ungated("preferred", "criticised", critic="always_accept", max_iterations=2),
    "noisy_10": _ungated("preferred", "criticised", critic="noisy", noise=0.1, max_iterations=1),
    "noisy_30": _ungated("preferred", "criticised", critic="noisy", noise=0.3, max_iterations=1),
    "random_pairs": _ungated("random", "criticised", max_iterations=1),
    "best_plan": _ungated("best", "criticised", max_iterations=1, budget_matched=("planner",)),
    "rft": _ungated("solved", "solved", critic="execution", budget_matched=("planner", "grounder")),
    "extra_steps": _ungated("gold", "gold", budget_matched=("planner", "grounder")),
}
# One model that writes plan and program, trained on the gold rows for as long as the first arm's two are.
INTEGRATED = "integrated"


@dataclass
class TasksConfig:
    """How many tasks each split has. ``align`` has no gold plans; ``test_out`` has compositions of its own."""

    train: int = key(240, "tasks with gold plans and actions, for the start and replay", ge=1)
    align: int = key(240, "tasks with gold actions alone, for both stages", ge=1)
    probe: int = key(200, "tasks on which the surrogate is measured after every stage", ge=2)
    dev: int = key(300, "tasks on which the gate decides", ge=3)
    test_in: int = key(600, "test tasks of trained compositions", ge=1)
    test_out: int = key(600, "test tasks of compositions that no other split has", ge=1)
    source: str = key(
        "tools", "tools: a generated world; gsm8k: word problems; hotpotqa: searches", choices=tuple(SOURCES)
    )
    path: str = key("", "folder with the source's files, or openai/gsm8k of the Hugging Face hub; empty: MOBULA_DATA")
    seed: int = key(0, "seed of worlds and tasks, apart from the experiment's: seeds share their tests", ge=0)
    style_mismatch: bool = key(True, "false: the grounder's annotations vary as the planner's do (the control world)")

    @property
    def worlds(self) -> WorldSet:
        """The worlds that the tasks are of."""
        return WorldSet(self.source, self.seed, self.path)

    @property
    def sizes(self) -> dict[str, int]:
        """How many tasks each split has, those that are trained on first."""
        learned = {"train": self.train, "align": self.align, "probe": self.probe, "dev": self.dev}
        return {**learned, "test_in": self.test_in, "test_out": self.test_out}


@dataclass
class ModelConfig(BaseModelConfig):
    """Planner and grounder: two small networks of this shape, or a pretrained one trained twice."""

    layers: int = key(2, "layers of a small network", ge=1)
    width: int = key(96, "width", ge=8)
    heads: int = key(4, "attention heads", ge=1)
    positions: int = key(192, "most tokens of a prompt and what follows it", ge=16)


@dataclass
class MoatConfig:
    """Both stages of an iteration (paper, section 3)."""

    RENAMED: ClassVar = {f"critic_{name}": f"endpoint.{name}" for name in ("url", "model", "key")}

    grounder_view: str = key("plan_only", "plan_only: grounders do not see the task", choices=("plan_only", "full"))
    samples: int = key(8, "plans proposed for a task (K)", ge=2, le=64)
    temperature: float = key(1.0, "temperature of proposed plans", gt=0)
    top_p: float = key(0.95, "nucleus of proposed plans", gt=0, le=1)
    max_plan: int = key(48, "most tokens of a plan", ge=1)
    max_program: int = key(72, "most tokens of a program", ge=1)
    margin: float = key(0.1, "least difference of a pair, nats per token of the gold actions", ge=0)
    pairs_per_prompt: int = key(1, "pairs of a task, from the outside in", ge=1, le=8)
    fewest_pairs: int = key(8, "with fewer pairs the planner is left as it is", ge=1)
    beta: float = key(0.2, "pull towards the planner at the start of the iteration", gt=0)
    chosen_nll: float = key(0.3, "weight of the chosen plans' likelihood (lambda; 0 in the paper)", ge=0)
    plans_per_task: int = key(3, "plans of a task that the grounder learns from", ge=1, le=64)
    ground_temperature: float = key(0.1, "temperature of programs written for them", ge=0)
    replay: bool = key(True, "gold grounder rows beside the critic's")
    max_leak: float = key(0.6, "share of the gold program beyond the task that a plan may repeat", ge=0, le=1)
    critic: str = key("executable", "who judges programs", choices=CRITICS)
    noise: float = key(0.0, "share of verdicts that critic=noisy flips", ge=0, le=1)
    max_verdict: int = key(1024, "critic=llm: most tokens of a verdict, reasoning included; a longer one fails", ge=16)
    endpoint: EndpointConfig = section(EndpointConfig)  # of critic=llm

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        if self.critic == "llm" and not self.endpoint.usable:
            return ["critic=llm needs endpoint.url and endpoint.model"]
        return []


def _training(**defaults: Any) -> TrainingConfig:
    """A section with defaults of its own."""
    return section(lambda: TrainingConfig(batch=32, **defaults))  # type: ignore[arg-type]


@dataclass
class Config(StudyConfig):
    """A MOAT experiment: one start for all arms of a seed, then every arm alternates by itself."""

    RENAMED: ClassVar = {"stage0": "sft", "prefer": "dpo", "improve": "grounder_sft", "matched": "budget_matched"}

    arms: list[str] = key(["moat"], f"what is compared with independent agents: {', '.join([*ARMS, INTEGRATED])}")
    tasks: TasksConfig = section(TasksConfig)
    model: ModelConfig = section(ModelConfig)
    moat: MoatConfig = section(MoatConfig)
    gate: GateConfig = section(GateConfig)
    alternation: AlternationConfig = section(AlternationConfig)
    # How the agents are trained apart, before any arm.
    sft: TrainingConfig = _training(steps=350, lr=2e-3, schedule="cosine")
    dpo: TrainingConfig = _training(steps=120, lr=1e-4)
    grounder_sft: TrainingConfig = _training(steps=120, lr=5e-4)
    # How arms are trained that spend as much as another one; `steps` follows from that.
    budget_matched: TrainingConfig = _training(steps=1, lr=5e-4)
    rates: dict[str, float] = key({}, "learning rate of a budget-matched arm if not budget_matched.lr, by arm")

    def steps(self) -> Iterator[Step]:
        """Rows of ``model.positions`` tokens; of a preference there are two."""
        if self.model.base:
            longest = max(self.moat.max_plan, self.moat.max_program)
            for name, rows in (("sft", 1), ("dpo", 2), ("grounder_sft", 1), ("budget_matched", 1)):
                training = getattr(self, name)
                yield Step(name, training, rows * training.micro, self.model.positions, longest)

    def iterations(self, arm: str) -> int:
        """How many iterations an arm has at most."""
        most = ARMS[arm].max_iterations if arm in ARMS else None
        return min(self.alternation.iterations, most or self.alternation.iterations)

    def counterpart(self, arm: str) -> System:
        """What an arm is compared with: the first arm, or that of an ablation, after as many iterations."""
        other = (ARMS[arm].against if arm in ARMS else "") or self.arms[0]
        iterations = self.iterations(arm)
        return System(other) if iterations >= self.iterations(other) else System.of(other, iterations=iterations)

    def problems(self) -> Iterator[str]:
        """Contradictions across sections."""
        trainings = ("sft", "dpo", "grounder_sft", "budget_matched")
        workers = {f"{name}.workers": getattr(self, name).workers for name in trainings}
        yield from self.study_problems([*ARMS, INTEGRATED], {"alternation.actors": self.alternation.actors, **workers})
        matched = [name for name, arm in ARMS.items() if arm.budget_matched]
        for arm, rate in self.rates.items():
            if arm not in matched:
                yield f"rates: {arm!r} is no budget-matched arm; expected {', '.join(matched)}"
            elif not rate > 0:
                yield f"rates.{arm}={rate} must be above 0"
        if self.arms and self.arms[0] in (INTEGRATED, *matched):
            yield f"arms: {self.arms[0]} trains as long as another arm does, so it cannot be the first"
        for arm in self.arms:
            other = ARMS[arm].against if arm in ARMS else ""
            if other and other not in self.arms:
                yield f"arms: {arm} is compared with {other}; add it"
        if self.model.width % self.model.heads:
            yield f"model.width={self.model.width} does not divide among model.heads={self.model.heads}"
