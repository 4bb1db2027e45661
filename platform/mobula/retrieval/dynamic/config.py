"""The config of a `dynamic_retrieval` experiment, and the systems that it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from mobula.config import build, key, nearest, section
from mobula.data.config import DataConfig
from mobula.data.sessions import SessionsConfig
from mobula.errors import MobulaError
from mobula.evaluation.ranking import MEASURES
from mobula.experiment import ExperimentConfig
from mobula.retrieval import arms as arm_names
from mobula.retrieval.arms import Arm
from mobula.retrieval.build import LANGUAGE_MODELS, ModelConfig
from mobula.retrieval.config import RENAMED, PseudoQueriesConfig
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.families import FAMILIES, NUMERIC, QUANTISED
from mobula.retrieval.dynamic.chunks import ChunksConfig, Expansion
from mobula.retrieval.dynamic.multi import MultiConfig
from mobula.retrieval.fusion import FusionConfig
from mobula.retrieval.ngrams.config import NgramConfig
from mobula.retrieval.paradigms import LossConfig
from mobula.study import StudyEvaluation, System, parallel_problems
from mobula.training import TrainingConfig

BASELINES = ("bm25", "dense", "dual", "dual_hn", "adc")
MULTI = "multi_chunk"
NGRAMS = ("ngram", "multiview")
HYBRID = "hybrid"
# What a system may set for itself, and the section that has the key: "ngram most_frequent=500".
OWN = {
    "embed": "model",
    "most_frequent": "ngram",
    "per_document": "chunks",
    "expand": "multi",
    "aggregate": "multi",
    "tie": "multi",
}


class SessionSystem(System):
    """A system of the comparison by value: ``paradigm/family`` or another name, and how it differs from the config."""

    @classmethod
    def parse(cls, text: str) -> SessionSystem:
        """A system as ``systems`` has it, such as ``ngram most_frequent=500``.

        Raises:
            ValueError: for a part behind the name without a value.
        """
        arm, _, options = text.partition(" ")
        if not options:
            return cls(arm)
        return cls(arm, tuple((name, value) for name, value in (part.split("=", 1) for part in options.split(","))))

    @property
    def label(self) -> str:
        """As ``systems`` has it: ``autoregressive/multi_chunk expand=free,tie=residual``."""
        return " ".join(filter(None, [self.arm, ",".join(f"{name}={value}" for name, value in self.options)]))

    @property
    def trained(self) -> SessionSystem:
        """The system whose training it uses: another way to search several docids needs none of its own."""
        return SessionSystem(self.arm, tuple(option for option in self.options if OWN[option[0]] != "multi"))

    @property
    def may_set(self) -> tuple[str, ...]:
        """The keys of :data:`OWN` that concern it."""
        if self.arm in NGRAMS:
            return ("embed", "most_frequent")
        if self.family == MULTI:
            return ("per_document", "expand", "aggregate", "tie")
        # Text docids that are no n-grams keep given vectors for their codes, whatever the query's are.
        return ("embed",) if self.family in NUMERIC else ()

    @property
    def paradigm(self) -> str:
        """How it learns; ``adc`` for code-only retrieval, the whole name for others."""
        return self.arm.partition("/")[0]

    @property
    def family(self) -> str:
        """The docid family; empty for systems without docids."""
        return self.arm.partition("/")[2]


@dataclass
class LearningRates:
    """Learning rates. Of several, the first system of the kind tries each on dev, and the others take its choice."""

    numeric: list[float] = key([3e-3], "docid models with numeric codes", gt=0)
    text: list[float] = key([3e-3], "docid models with text codes, n-gram language models", gt=0)
    dual: list[float] = key([1e-3], "dual encoders", gt=0)
    share: float = key(0.2, "share of the examples that a trial of one rate gets", gt=0, le=1)


@dataclass
class EvaluationConfig(StudyEvaluation):
    """What is measured, on every session at every state of the corpus."""

    primary: str = key("Hit@10", "measure that claims use", choices=MEASURES)
    depth: int = key(100, "documents per ranked list", ge=1, le=1000)
    beam: int = key(100, "beam width of autoregressive docid models", ge=1, le=256)
    max_rows: int | None = key(None, "rows per session; null: all", ge=1)
    dev_queries: int = key(200, "dev queries scored while training", ge=1)
    latency_queries: int = key(30, "queries timed one by one at the last state", ge=1)


def _numeric() -> DocidConfig:
    return DocidConfig(levels=4, codes=32, fit_on="windows")


def _text() -> DocidConfig:
    return DocidConfig(family="text.title", levels=8)


@dataclass
class Config(ExperimentConfig):
    """Which systems are searched through the sessions. ``paradigm/family`` systems and n-gram systems are trained."""

    RENAMED: ClassVar = {
        **RENAMED,
        "evaluation.variants": "systems, as in `autoregressive/multi_chunk expand=free`",
        "evaluation.chunk_counts": "systems, as in `autoregressive/multi_chunk per_document=1`",
    }

    systems: list[str] = key(
        ["bm25", "dense", "adc", "autoregressive/rq", "autoregressive/random", "autoregressive/multi_chunk", "ngram"],
        "bm25, dense, dual, dual_hn, adc, paradigm/family, paradigm/multi_chunk, ngram, multiview, hybrid; "
        "one may set a key for itself: `ngram most_frequent=500`, `autoregressive/multi_chunk expand=free`",
    )
    parallel: int = key(
        1, "trainings at a time, later systems that are searched, each on a Ray actor; 1: in this process", ge=1
    )
    data: DataConfig = section(DataConfig)
    sessions: SessionsConfig = section(SessionsConfig)
    docid: DocidConfig = section(_numeric)  # type: ignore[arg-type]
    text: DocidConfig = section(_text)  # type: ignore[arg-type]
    chunks: ChunksConfig = section(ChunksConfig)
    multi: MultiConfig = section(MultiConfig)
    ngram: NgramConfig = section(NgramConfig)
    fusion: FusionConfig = section(FusionConfig)
    model: ModelConfig = section(ModelConfig)
    pseudo_queries: PseudoQueriesConfig = section(PseudoQueriesConfig)
    loss: LossConfig = section(LossConfig)
    learning_rates: LearningRates = section(LearningRates)
    training: TrainingConfig = section(TrainingConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)

    def problems(self) -> list[str]:
        """Contradictions across sections."""
        problems = list(self._bad_systems())
        if self.model.backbone in LANGUAGE_MODELS:
            problems.append(f"model.backbone={self.model.backbone}: dynamic_retrieval trains small and encoder only")
        problems.extend(parallel_problems(self.parallel, {"training.workers": self.training.workers}))
        numeric = any("/" in name for name in self.systems)
        if HYBRID in self.systems and not (numeric and "ngram" in self.systems):
            problems.append("systems: hybrid fuses a numeric system with ngram; name both")
        return problems

    def serving_problems(self) -> list[str]:
        """What an artifact lacks that a trial of a sweep does without: better known before training."""
        if self.parsed_arms:
            return []
        return ["systems: name at least one paradigm/family system; the first is served by default"]

    @property
    def parsed(self) -> list[SessionSystem]:
        """``systems`` by value."""
        return list(map(SessionSystem.parse, self.systems))

    @property
    def parsed_arms(self) -> list[Arm]:
        """The trained docid systems of one docid per document, without those that set something for themselves."""
        plain = (system for system in self.parsed if not system.options)
        return [Arm(system.paradigm, system.family) for system in plain if system.family in FAMILIES]

    @property
    def multis(self) -> list[SessionSystem]:
        """The multi_chunk systems."""
        return [system for system in self.parsed if system.family == MULTI]

    @property
    def grams(self) -> list[SessionSystem]:
        """The n-gram systems."""
        return [system for system in self.parsed if system.arm in NGRAMS]

    def own(self, system: SessionSystem) -> Config:
        """The config with what a system sets for itself."""
        own = self
        for name, value in system.options:
            settings = getattr(own, OWN[name])
            changed = build(type(settings), asdict(settings), [f"{name}={value}"], system.label)
            own = replace(own, **{OWN[name]: changed})
        return own

    def docid_of(self, family: str) -> DocidConfig:
        """The docid settings of a family."""
        return replace(self.text if FAMILIES[family].is_text else self.docid, family=family)

    def _bad_systems(self) -> Iterator[str]:
        known = (*BASELINES, *NGRAMS, HYBRID)
        for name in self.systems:
            arm, _, options = name.partition(" ")
            paradigm, _, family = arm.partition("/")
            if family == MULTI:
                if paradigm not in ("autoregressive", "diffusion"):
                    yield f"systems: {name}: multi_chunk is trained autoregressive or by diffusion"
                elif self.docid.family not in QUANTISED:
                    yield f"systems: {name} needs docid.family to be one of {', '.join(QUANTISED)}"
            elif arm not in known:
                try:
                    arm_names.parse(arm)
                except ValueError as error:
                    yield f"systems: {error}" if family else f"systems: unknown {arm!r}{nearest(arm, known)}"
            if options:
                yield from self._bad_options(name)
        if not self.systems:
            yield "systems is empty; name at least one"

    def _bad_options(self, name: str) -> Iterator[str]:
        try:
            system = SessionSystem.parse(name)
        except ValueError:
            yield f"systems: {name!r}; write the system, a space, and what it sets: {' or '.join(OWN)}=value"
            return
        if system.arm not in self.systems:
            yield f"systems: {name}: name {system.arm!r} too, which it is compared with"
        for setting, _ in system.options:
            if setting not in system.may_set:
                valid = " or ".join(system.may_set) or "nothing"
                yield f"systems: {name}: {system.arm} cannot set {setting!r}, only {valid}"
                return
        try:
            own = self.own(system)
            Expansion.parse(own.multi.expand, self.docid.levels)
        except MobulaError as error:
            yield f"systems: {name}: {error}"
        else:
            if own == self:
                yield f"systems: {name}: sets what the config has already; give it another value"
