"""The config of a `dro` experiment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from mobula.alternation import AlternationConfig
from mobula.config import key, section
from mobula.data.jsonl import JSONL, size_problems
from mobula.models.finetune import BaseModelConfig
from mobula.models.memory import Step
from mobula.rag import em
from mobula.rag.candidates import SETS, RetrieveConfig
from mobula.rag.permutations import LABELS
from mobula.study import StudyConfig, StudyEvaluation, System
from mobula.training import TrainingConfig

COLD, FACTS = "cold_start", "facts"
KINDS = ("selector", "generator")
# Metrics of dev questions that the selected passages alone decide.
OF_SELECTION = ("dev_hit@", "dev_recall", "dev_all_gold", "dev_gold", "dev_tau")


@dataclass(frozen=True)
class Arm:
    """An arm of the comparison: the rule of its weights, its samples a question, which networks it trains.

    None: as configured. ``select``: one of :data:`mobula.rag.selections.SELECTIONS`, in training and afterwards;
    ``sampler``: in training, if not the same. ``greedy``: the generator learns from the selector's greedy permutation
    instead of weighted samples.
    """

    rule: str | None = None
    samples: int | None = None
    train: tuple[str, ...] = KINDS
    select: str = "selector"
    sampler: str = ""
    greedy: bool = False

    @property
    def samples_from(self) -> str:
        """Who selects the passages in training."""
        return self.sampler or self.select


ARMS = {
    "dro": Arm(),
    "selector_only": Arm(train=("selector",)),
    "generator_only": Arm(train=("generator",)),
    "uniform": Arm(rule="uniform"),
    "best": Arm(rule="best"),
    "binary": Arm(rule="binary"),
    "unnormalised": Arm(rule="unnormalised"),
    **{f"m_{m}": Arm(samples=m) for m in (1, 2, 4, 14)},
    **{f"unnormalised_m_{m}": Arm(rule="unnormalised", samples=m) for m in (1, 2, 4, 14)},
    "reward": Arm(rule="reward"),
    "reinforce": Arm(rule="reinforce", greedy=True),
    # What the selector could learn if relevant passages were labelled.
    "supervised": Arm(rule="uniform", samples=1, train=("selector",), sampler="gold"),
    # The selector's first choice imitates how likely each passage alone makes the answer (Izacard et al. 2022, Atlas).
    "distillation": Arm(rule="snis", sampler="each", greedy=True),
    "rag_sft": Arm(rule="uniform", samples=1, train=("generator",), select="retriever"),
    "closed_book": Arm(rule="uniform", samples=1, train=("generator",), select="none"),
}
RENAMED_ARMS = {"lik_raw": "unnormalised", **{f"raw_m_{m}": f"unnormalised_m_{m}" for m in (1, 2, 4, 14)}}


@dataclass
class DataConfig:
    """How many questions each split has."""

    source: str = key(
        FACTS,
        "facts: a generated world; nq and hotpotqa: real questions with passages; jsonl: the user's own",
        choices=(FACTS, *SETS, JSONL),
    )
    path: str = key(
        "", "folder of the jsonl files, or of the set's, or its id on the Hugging Face hub; empty: MOBULA_DATA"
    )
    labelled: int = key(1500, "questions with their gold facts, for the cold start alone", ge=1)
    train: int | None = key(3000, "questions with answers alone, for EM; null, source=jsonl: all", ge=1)
    dev: int | None = key(500, "questions that choose the best iteration; null: all", ge=2)
    test: int | None = key(1000, "questions that are looked at once, after all training; null: all", ge=2)
    seed: int = key(0, "seed of the questions, apart from the experiment's: seeds share their tests", ge=0)

    @property
    def sizes(self) -> dict[str, int | None]:
        """How many questions each split has."""
        return {"labelled": self.labelled, "train": self.train, "dev": self.dev, "test": self.test}

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        return list(size_problems(self.source, self.path, self.sizes))


@dataclass
class SelectConfig:
    """How a language model writes its list of passages."""

    decode: str = key(
        "constrained",
        "constrained: lists alone are possible; free: text, parsed and filled",
        choices=("constrained", "free"),
    )
    labels: str = key("numbers", "what passages are called in the prompt", choices=LABELS)

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        clash = self.decode == "free" and self.labels == "letters"
        return ["labels=letters needs decode=constrained: free text is read for numbers"] if clash else []


@dataclass
class ModelConfig(BaseModelConfig):
    """Selector and generator: two small networks, or a pretrained language model trained twice."""

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

    selector_steps: int = key(200, "steps on which the selector learns gold permutations", ge=1)
    generator_steps: int = key(30, "steps on which the generator learns answers from gold facts", ge=1)
    reading_steps: int = key(0, "steps on which a span-scoring generator first learns to read, from SQuAD", ge=0)
    reading_path: str = key("", "folder with SQuAD's file; empty: MOBULA_DATA")


@dataclass
class EmConfig(em.EmConfig):
    """The E-step, and what is asked of an M-step."""

    samples: int = key(8, "permutations sampled a question (m)", ge=1, le=1000)
    shard: int = key(500, "questions sampled and scored together; an interrupted phase goes on at a shard", ge=1)


@dataclass
class EvaluationConfig(StudyEvaluation):
    """What is measured, on dev questions each iteration and on test questions once."""

    redraws: int = key(32, "re-draws that the variance of estimates from samples is measured with", ge=2)


@dataclass
class Config(StudyConfig):
    """A DRO experiment: one cold start for all arms of a seed, then every arm alternates by itself."""

    arms: list[str] = key(["dro"], f"what is compared with the cold start: {', '.join(ARMS)}")
    data: DataConfig = section(DataConfig)
    retrieve: RetrieveConfig = section(RetrieveConfig)
    select: SelectConfig = section(SelectConfig)
    model: ModelConfig = section(ModelConfig)
    cold: ColdConfig = section(ColdConfig)
    em: EmConfig = section(EmConfig)
    alternation: AlternationConfig = section(AlternationConfig)
    fit: TrainingConfig = section(partial(TrainingConfig, steps=80, batch=64, lr=2e-3, warmup=0.0, decay=0.0))  # type: ignore[arg-type]
    evaluation: EvaluationConfig = section(EvaluationConfig)

    def steps(self) -> Iterator[Step]:
        """A question's permutations are rows of one micro-batch."""
        if self.model.base:
            rows, answer = self.fit.micro * self.em.samples, self.model.answer_tokens
            yield Step("fit", self.fit, rows, self.model.positions + answer, answer)

    def em_of(self, arm: Arm) -> EmConfig:
        """The E-step of an arm."""
        weights = replace(self.em.weights, rule=arm.rule or self.em.weights.rule)
        return replace(self.em, samples=arm.samples or self.em.samples, weights=weights)

    def alternation_of(self, arm: Arm) -> AlternationConfig:
        """The alternation of an arm, whose monitored metric is one that its training can change.

        What passages are selected does not depend on a generator: an arm that trains that alone is judged by answers.
        """
        if "selector" in arm.train or not self.alternation.monitor.startswith(OF_SELECTION):
            return self.alternation
        return replace(self.alternation, monitor="dev_em" if self.data.source == FACTS else "dev_f1")

    def passage_baselines(self) -> dict[str, System]:
        """Test questions of real sets answered from passages that are not the selector's own."""
        if self.data.source == FACTS:
            return {}
        arms = {"retriever": COLD, "first": COLD, "gold": self.arms[0], "no_gold": self.arms[0]}
        return {name: System.of(arm, passages=name) for name, arm in arms.items()}

    def problems(self) -> Iterator[str]:
        """Contradictions across sections."""
        yield from self.retrieve.misfits(self.data.source)
        workers = {"alternation.actors": self.alternation.actors, "fit.workers": self.fit.workers}
        yield from self.study_problems(list(ARMS), workers, RENAMED_ARMS)
        if self.em.weights.correction != "none":
            yield "em.weights.correction=exact: permutations come from the selector itself, nothing is to be corrected"
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
            if others := [name for name, arm in named.items() if arm.select != "selector" or arm.sampler]:
                yield f"arms: {', '.join(others)} need real questions, which have a retriever; set data.source"
        elif self.data.source == JSONL and self.retrieve.pool == "own":
            yield f"retrieve.pool=own: questions of data.source={JSONL} come with no passages; use pool=corpus"
        elif "closed_book" in self.arms and not self.model.base:
            yield "arms: closed_book needs model.base; a reader of spans answers nothing without passages"
