"""The config of a `dynamic_retrieval` experiment, and the systems that it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from mobula.config import build, key, nearest, section
from mobula.data.config import DataConfig
from mobula.data.sessions import SessionsConfig
from mobula.errors import ConfigError, MobulaError
from mobula.evaluation.ranking import MEASURES
from mobula.experiment import ExperimentConfig
from mobula.retrieval import arms as arm_names
from mobula.retrieval.arms import Arm
from mobula.retrieval.build import LANGUAGE_MODELS, ModelConfig
from mobula.retrieval.config import RENAMED, PseudoQueriesConfig
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.families import FAMILIES, NUMERIC, QUANTISED
from mobula.retrieval.dynamic.chunks import ChunksConfig, Expansion
from mobula.retrieval.dynamic.hybrid import FusionConfig
from mobula.retrieval.dynamic.multi import MultiConfig
from mobula.retrieval.ngrams.config import NgramConfig
from mobula.retrieval.paradigms import LossConfig
from mobula.study import StudyEvaluation, System, parallel_problems
from mobula.training import TrainingConfig

BASELINES = ("bm25", "dense", "dual", "dual_hn", "adc")
MULTI = "multi_chunk"
NGRAMS = ("ngram", "multiview")
HYBRID = "hybrid"
# What a system may set for itself, and the section that has the key: "ngram most_frequent=500".
OWN = {"embed": "model", "most_frequent": "ngram"}


def options_of(text: str) -> tuple[tuple[str, str], ...]:
    """``expand=free,tie=residual`` by name.

    Raises:
        ValueError: for a part without a value.
    """
    return tuple((name, value) for name, value in (part.split("=", 1) for part in text.split(",")))


class SessionSystem(System):
    """A system of the comparison by value: ``paradigm/family`` or another name, and how it differs from the config."""

    @classmethod
    def parse(cls, text: str) -> SessionSystem:
        """A system as ``systems`` has it, such as ``ngram most_frequent=500``.

        Raises:
            ValueError: for a part behind the name without a value.
        """
        arm, _, options = text.partition(" ")
        return cls(arm, options_of(options) if options else ())

    @property
    def label(self) -> str:
        """For tables and plots: ``autoregressive/multi_chunk expand=free,tie=residual``."""
        return " ".join(filter(None, [self.arm, ",".join(f"{name}={value}" for name, value in self.options)]))

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
    variants: list[str] = key(
        [], "further ways to search a trained multi_chunk model, such as expand=free,aggregate=max"
    )
    chunk_counts: list[int] = key([], "further values of chunks.per_document, each with a model of its own", ge=1)
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

    RENAMED: ClassVar = RENAMED

    systems: list[str] = key(
        ["bm25", "dense", "adc", "autoregressive/rq", "autoregressive/random", "autoregressive/multi_chunk", "ngram"],
        "bm25, dense, dual, dual_hn, adc, paradigm/family, paradigm/multi_chunk, ngram, multiview, hybrid; "
        "a control sets a key for itself: `ngram most_frequent=500`, `ngram embed=random`",
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
        for text in self.evaluation.variants:
            problems.extend(self._bad_variant(text))
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
    def parsed_arms(self) -> list[Arm]:
        """The trained docid systems of one docid per document."""
        numeric = (name for name in self.systems if "/" in name and " " not in name)
        return [arm_names.parse(name) for name in numeric if not name.endswith(f"/{MULTI}")]

    @property
    def controls(self) -> list[SessionSystem]:
        """Systems that set something for themselves, each with a training of its own."""
        return [system for system in map(SessionSystem.parse, self.systems) if system.options]

    def own(self, control: SessionSystem) -> Config:
        """The config as a control trains by it."""
        own = self
        for name, value in control.options:
            settings = getattr(own, OWN[name])
            changed = build(type(settings), asdict(settings), [f"{name}={value}"], control.label)
            own = replace(own, **{OWN[name]: changed})
        return own

    @property
    def multi_paradigms(self) -> list[str]:
        """Paradigms of the multi_chunk systems."""
        return [name.partition("/")[0] for name in self.systems if name.endswith(f"/{MULTI}")]

    def multi_system(self, paradigm: str, per_document: int | None = None) -> SessionSystem:
        """The multi_chunk system of a paradigm; one with another number of chunks than ``chunks`` says so."""
        is_other = per_document not in (None, self.chunks.per_document)
        return SessionSystem(f"{paradigm}/{MULTI}", (("m", per_document),) if is_other else ())

    @property
    def grams(self) -> list[SessionSystem]:
        """The n-gram systems, controls after those they are compared with."""
        plain = [SessionSystem(name) for name in NGRAMS if name in self.systems]
        return plain + [control for control in self.controls if control.arm in NGRAMS]

    def docid_of(self, family: str) -> DocidConfig:
        """The docid settings of a family."""
        return replace(self.text if FAMILIES[family].is_text else self.docid, family=family)

    def variant(self, text: str) -> MultiConfig:
        """``multi`` with changes such as ``expand=free,tie=residual``."""
        return replace(self.multi, **dict(options_of(text)))

    def _bad_systems(self) -> Iterator[str]:
        known = (*BASELINES, *NGRAMS, HYBRID)
        for name in self.systems:
            if name in known:
                continue
            if " " in name:
                yield from self._bad_control(name)
                continue
            paradigm, _, family = name.partition("/")
            if family == MULTI:
                if paradigm not in ("autoregressive", "diffusion"):
                    yield f"systems: {name}: multi_chunk is trained autoregressive or by diffusion"
                elif self.docid.family not in QUANTISED:
                    yield f"systems: {name} needs docid.family to be one of {', '.join(QUANTISED)}"
                continue
            try:
                arm_names.parse(name)
            except ValueError as error:
                yield f"systems: {error}" if family else f"systems: unknown {name!r}{nearest(name, known)}"
        if not self.systems:
            yield "systems is empty; name at least one"

    def _bad_control(self, name: str) -> Iterator[str]:
        try:
            control = SessionSystem.parse(name)
        except ValueError:
            yield f"systems: {name!r}; write the system, a space, and what it sets: {' or '.join(OWN)}=value"
            return
        if control.arm not in self.systems:
            yield f"systems: {name}: name {control.arm!r} too, which it is compared with"
        # The codes of other text docids have given vectors, whatever the query's are.
        own = OWN if control.arm in NGRAMS else ("embed",) if control.family in NUMERIC else ()
        unknown = [setting for setting, _ in control.options if setting not in own]
        if unknown:
            yield f"systems: {name}: {control.arm} cannot set {unknown[0]!r}, only {' or '.join(own) or 'nothing'}"
            return
        try:
            self.own(control)
        except ConfigError as error:
            yield f"systems: {error}"

    def _bad_variant(self, text: str) -> Iterator[str]:
        try:
            Expansion.parse(self.variant(text).expand, self.docid.levels)
        except (TypeError, ValueError):
            yield f"evaluation.variants: {text!r}; write key=value of the section multi, separated by commas"
        except MobulaError as error:
            yield f"evaluation.variants: {error}"
