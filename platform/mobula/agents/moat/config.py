"""The config of a `moat` experiment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mobula.agents.gate import GateConfig
from mobula.agents.moat.critic import KINDS
from mobula.alternation import AlternationConfig
from mobula.config import key, nearest, section
from mobula.experiment import ExperimentConfig
from mobula.training import TrainingConfig

INDEPENDENT = "independent"


@dataclass(frozen=True)
class Arm:
    """What an arm of the comparison does in an iteration, and which critic it has (empty: the config's)."""

    prefer: bool
    improve: bool
    critic: str = ""


ARMS = {
    "moat": Arm(prefer=True, improve=True),
    "planner_only": Arm(prefer=True, improve=False),
    "grounder_only": Arm(prefer=False, improve=True),
    "no_critic": Arm(prefer=True, improve=True, critic="always_accept"),
}


@dataclass
class TasksConfig:
    """How many tasks each split has. ``align`` has no gold plans; ``test_out`` has compositions of its own."""

    train: int = key(240, "tasks with gold plans and actions, for stage 0 and replay", ge=1)
    align: int = key(240, "tasks with gold actions alone, for both stages", ge=1)
    probe: int = key(200, "tasks on which the surrogate is measured after every stage", ge=2)
    dev: int = key(300, "tasks on which the gate decides", ge=3)
    test_in: int = key(600, "test tasks of trained compositions", ge=1)
    test_out: int = key(600, "test tasks of compositions that no other split has", ge=1)
    seed: int = key(0, "seed of worlds and tasks, apart from the experiment's: seeds share their tests", ge=0)
    style_mismatch: bool = key(True, "false: the grounder's annotations vary as the planner's do (the control world)")


@dataclass
class ModelConfig:
    """Planner and grounder: two small networks of this shape."""

    layers: int = key(2, "layers", ge=1)
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


@dataclass
class Config(ExperimentConfig):
    """A MOAT experiment: one start for all arms of a seed, then every arm alternates by itself."""

    arms: list[str] = key(["moat"], "what is compared with independently trained agents")
    tasks: TasksConfig = section(TasksConfig)
    model: ModelConfig = section(ModelConfig)
    moat: MoatConfig = section(MoatConfig)
    gate: GateConfig = section(GateConfig)
    alternation: AlternationConfig = section(AlternationConfig)
    stage0: TrainingConfig = section(_stage0)  # type: ignore[arg-type]
    prefer: TrainingConfig = section(_prefer)  # type: ignore[arg-type]
    improve: TrainingConfig = section(_improve)  # type: ignore[arg-type]
    evaluation: EvaluationConfig = section(EvaluationConfig)

    def problems(self) -> Iterator[str]:
        """Contradictions across sections."""
        for name in self.arms:
            if name not in ARMS:
                yield f"arms: unknown {name!r}{nearest(name, list(ARMS))}; expected {', '.join(ARMS)}"
        if not self.arms:
            yield "arms is empty; the first one is served"
        if self.model.width % self.model.heads:
            yield f"model.width={self.model.width} does not divide among model.heads={self.model.heads}"
