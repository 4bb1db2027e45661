"""The config of an `exsearch` experiment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from mobula.alternation import AlternationConfig
from mobula.config import key, section
from mobula.data.jsonl import JSONL, size_problems
from mobula.models.finetune import BaseModelConfig
from mobula.models.memory import Step
from mobula.rag.em import EmConfig
from mobula.rag.search import KINDS
from mobula.rag.searchers import SearchConfig
from mobula.study import StudyConfig
from mobula.training import TrainingConfig

SKILL, WARM_UP = "skill", "warm_up"  # before EM: the start of a small model, and what has seen oracle trajectories
STEPS = ("think", "search", "record")


@dataclass(frozen=True)
class Mode:
    """Which of its steps an agent takes.

    Without ``think`` every sub-query is the question itself, without ``search`` no passage is shown, without
    ``record`` no fact stays in the chat. With ``select`` it chooses among candidates what is shown. With
    ``record_from_evidence`` a fact is written from its sub-query and passages alone, p(e_i | x_i, d_i) as in the
    paper's formula, instead of after the whole chat.
    """

    think: bool = True
    search: bool = True
    record: bool = True
    select: bool = False
    record_from_evidence: bool = False

    @property
    def name(self) -> str:
        """Names the mode in paths; that of an agent with every step is ``default``."""
        without = [f"no_{step}" for step in STEPS if not getattr(self, step)]
        more = [step for step in ("select", "record_from_evidence") if getattr(self, step)]
        return "-".join([*without, *more]) or "default"

    @property
    def seed_name(self) -> str:
        """What of the mode enters the seeds of its warm-up: older names, so that results repeat."""
        return "" if self == Mode() else self.name.replace("record_from_evidence", "apart")


@dataclass(frozen=True)
class Arm:
    """An arm of the study.

    ``learns``: by ``em``, by ``policy`` gradient relative to the group of a question's samples, or to answer
    ``direct``-ly from the question, with or without one search. ``rule``, ``gate``: of the weights; None: as
    configured.
    """

    learns: str = "em"
    rule: str | None = None
    gate: str | None = None
    mode: Mode = field(default_factory=Mode)


ARMS = {
    "exsearch": Arm(),
    "uniform": Arm(rule="uniform"),
    "best": Arm(rule="best"),
    "binary": Arm(rule="binary"),
    "reward": Arm(rule="reward"),
    "unnormalised": Arm(rule="unnormalised"),
    "lik_mean_exp": Arm(rule="lik_mean_exp"),
    "gate_none": Arm(gate="none"),
    "gate_skip": Arm(gate="skip"),
    "grpo": Arm("policy", rule="advantage", gate="none"),
    "no_think": Arm(mode=Mode(think=False)),
    "no_search": Arm(mode=Mode(search=False)),
    "no_record": Arm(mode=Mode(record=False)),
    "rerank": Arm(mode=Mode(select=True)),
    "record_from_evidence": Arm(mode=Mode(record_from_evidence=True)),
    "closed_book": Arm("direct", mode=Mode(search=False)),
    "single_shot": Arm("direct"),
}
RENAMED_ARMS = {"lik_raw": "unnormalised", "search_only": "record_from_evidence"}


@dataclass
class DataConfig:
    """The questions of each split; none is in two."""

    source: str = key(
        "world", "world: generated; hotpotqa: 500 questions and their paragraphs; jsonl: the user's own",
        choices=("world", "hotpotqa", JSONL),
    )  # fmt: skip
    path: str = key("", "folder of the jsonl files; source=hotpotqa: of its files, empty: MOBULA_DATA")
    test_set: str = key(
        "", "source=hotpotqa: hotpotqa_100 tests on 100 further questions among passages of their own; empty: the same",
        choices=("", "hotpotqa_100"),
    )  # fmt: skip
    warm_up: int = key(100, "questions with oracle trajectories, for the warm-up alone", ge=1)
    train: int | None = key(300, "questions with answers alone, for EM; null, source=jsonl: all", ge=1)
    dev: int | None = key(200, "questions that choose the best iteration, and whose bound is followed; null: all", ge=2)
    test: int | None = key(1000, "questions that are looked at once, after all training; null: all", ge=2)
    people: int = key(300, "source=world: people of a world", ge=10, le=3600)
    towns: int = key(60, "towns", ge=5, le=60)
    firms: int = key(40, "firms", ge=5, le=240)
    books: int = key(60, "books", ge=5, le=100)
    seed: int = key(0, "seed of worlds and questions, apart from the experiment's: seeds share their tests", ge=0)

    @property
    def sizes(self) -> dict[str, int | None]:
        """How many questions each split has."""
        return {"warm_up": self.warm_up, "train": self.train, "dev": self.dev, "test": self.test}

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        problems = list(size_problems(self.source, self.path, self.sizes))
        if self.source != "hotpotqa" and self.test_set:
            problems.append(f"test_set={self.test_set} needs source=hotpotqa")
        return problems


@dataclass
class ModelConfig(BaseModelConfig):
    """The agent: a small network that copies, or a pretrained one."""

    width: int = key(64, "width of a small network", ge=8)
    layers: int = key(2, "its layers", ge=1)
    heads: int = key(4, "its attention heads", ge=1)


@dataclass
class RetrieveConfig(SearchConfig):
    """Who answers searches, and how often an agent tries again."""

    kind: str = key("bm25", "how passages are found: by words, by vectors, or both fused by rank", choices=KINDS)
    retries: int = key(3, "further attempts", ge=0)
    backoff_s: float = key(0.5, "seconds before the first of them; doubled each time", ge=0)


@dataclass
class RolloutConfig:
    """An agent's turns and their limits."""

    max_turns: int = key(4, "turns of an agent; in the last one it cannot search any more", ge=2, le=64)
    max_action_tokens: int = key(24, "most tokens of a turn", ge=1)
    max_answer_tokens: int = key(6, "most tokens of an answer", ge=1)
    seq_len: int = key(512, "most tokens of a chat; what would not fit ends the search", ge=32)
    temperature: float = key(1.0, "temperature of sampled trajectories; others than 1 make weights heuristic", gt=0)
    top_p: float = key(1.0, "nucleus of sampled trajectories; below 1 it makes weights heuristic", gt=0, le=1)
    on_malformed: str = key(
        "repair", "repair: a malformed turn gets a second chance; terminate: it ends the search",
        choices=("repair", "terminate"),
    )  # fmt: skip
    k_show: int = key(2, "passages shown a search", ge=1, le=20)
    k_candidates: int = key(6, "passages that an agent which selects chooses from", ge=1, le=20)
    max_passage_tokens: int = key(160, "a pretrained model sees so many tokens of a passage", ge=1)
    batch: int = key(64, "chats that are continued together", ge=1)

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        clash = self.k_candidates < self.k_show
        return [f"k_candidates={self.k_candidates} is below k_show={self.k_show}"] if clash else []

    @property
    def heuristic(self) -> bool:
        """Whether trajectories are drawn from another distribution than the model's."""
        return self.temperature != 1 or self.top_p != 1


@dataclass
class SearchEmConfig(EmConfig):
    """The E-step and what the M-step learns from it."""

    samples: int = key(4, "trajectories sampled a question (m)", ge=1, le=64)
    reward: str = key("f1", "rule=reward and grpo: what rewards a sampled answer", choices=("em", "f1", "acc"))
    max_empty_facts: int | None = key(None, "leave out trajectories with more empty facts; null: none", ge=0)
    start_from: str = key("previous", "an M-step starts from", choices=("previous", "warm_up"))
    epochs: float = key(2.0, "passes of an M-step over its questions", gt=0)
    answer_coef: float = key(1.0, "weight of answer tokens beside those of the trajectory", ge=0)
    mix_warm_up: float = key(0.0, "oracle trajectories beside each M-step's questions, as a share of them", ge=0)
    clip: float = key(0.2, "grpo: how far a token's ratio to the sampling model may go from 1", gt=0, lt=1)


@dataclass
class Config(StudyConfig):
    """An EXSEARCH experiment: one warm-up for all arms of a seed, then every arm alternates by itself."""

    arms: list[str] = key(["exsearch"], f"what is compared with the warm-up: {', '.join(ARMS)}")
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    retrieve: RetrieveConfig = section(RetrieveConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    em: SearchEmConfig = section(SearchEmConfig)
    alternation: AlternationConfig = section(AlternationConfig)
    # Before the warm-up, small models alone: reading and the form of turns, on one-hop questions of other worlds.
    skill: TrainingConfig = section(partial(TrainingConfig, steps=800, batch=16, lr=2e-3, warmup=0.12))  # type: ignore[arg-type]
    skill_questions: int = key(4000, "one-hop questions of the skill stage", ge=1)
    warm_up: TrainingConfig = section(partial(TrainingConfig, steps=250, batch=16, lr=1e-3))  # type: ignore[arg-type]
    skill_share: float = key(0.5, "share of skill rows among those of the warm-up, small models alone", ge=0, lt=1)
    # One M-step; `steps` follows from em.epochs.
    fit: TrainingConfig = section(
        partial(TrainingConfig, steps=1, batch=8, lr=5e-4, schedule="cosine", warmup=0.1, decay=0.9)  # type: ignore[arg-type]
    )

    def steps(self) -> Iterator[Step]:
        """An M-step learns all trajectories of a question together."""
        if self.model.base:
            tokens, turns = self.rollout.seq_len, self.rollout.max_turns
            learned = min(tokens, turns * self.rollout.max_action_tokens + self.rollout.max_answer_tokens)
            yield Step("warm_up", self.warm_up, self.warm_up.micro, tokens, learned)
            yield Step("fit", self.fit, self.fit.micro * self.em.samples, tokens, learned)

    def of(self, arm: Arm) -> SearchEmConfig:
        """The E-step of an arm."""
        weights = self.em.weights
        return replace(self.em, weights=replace(weights, rule=arm.rule or weights.rule, gate=arm.gate or weights.gate))

    def problems(self) -> Iterator[str]:
        """Contradictions across sections."""
        trainings = {"skill": self.skill, "warm_up": self.warm_up, "fit": self.fit}
        workers = {f"{name}.workers": training.workers for name, training in trainings.items()}
        workers["alternation.actors"] = self.alternation.actors
        yield from self.study_problems([*ARMS], workers, RENAMED_ARMS)
        if self.arms and self.arms[0] in ARMS and ARMS[self.arms[0]].learns == "direct":
            yield f"arms: {self.arms[0]} does not alternate, so it cannot be the first"
        if self.model.width % self.model.heads or self.model.width // self.model.heads % 2:
            yield f"model.width={self.model.width} does not divide into model.heads={self.model.heads} of even width"
        if self.em.start_from != "previous":
            for arm in (arm for arm in self.arms if arm in ARMS and ARMS[arm].learns == "policy"):
                yield f"em.start_from={self.em.start_from}: {arm} learns from ratios to the model that sampled"
        if self.em.weights.correction == "exact" and self.rollout.top_p != 1:
            yield "em.weights.correction=exact needs rollout.top_p=1: it cannot correct for what is never drawn"
        if self.em.weights.correction == "exact" and self.rollout.on_malformed != "terminate":
            yield "em.weights.correction=exact needs rollout.on_malformed=terminate: a repaired turn is not drawn whole"
        if self.data.source == "world" and self.model.base:
            yield "model.base: the generated world has no sentences for a pretrained model; use data.source=hotpotqa"
        yield from self.retrieve.misfits(self.data.source, self.data.source == "world" or bool(self.data.test_set))
        if self.data.source != "world" and not self.model.base:
            yield f"data.source={self.data.source} needs model.base: a small network knows the words of the world alone"
