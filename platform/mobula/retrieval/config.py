"""The schema of a generative-retrieval experiment (DiffuGR and its twin)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from mobula.config import key, section
from mobula.data import DataConfig
from mobula.data.pseudo_queries import KINDS
from mobula.evaluation.ranking import MEASURES
from mobula.experiment import ExperimentConfig
from mobula.retrieval import arms as arm_names
from mobula.retrieval.arms import Arm
from mobula.retrieval.build import LANGUAGE_MODELS, ModelConfig
from mobula.retrieval.docids.config import DocidConfig, code_length
from mobula.retrieval.paradigms import LossConfig, MaskedDiffusion
from mobula.retrieval.search import MOST_EXHAUSTIVE, ORDERS, REMASK, SearchOptions
from mobula.training import TrainingConfig

BUDGETED = ("match", "match_rerank", "best_of_n")  # the decoders whose cost the denoising budget decides


RENAMED = {
    "views.pseudo": "pseudo_queries.kinds",
    "views.queries": "pseudo_queries.real_share",
    "views": "pseudo_queries",
}


@dataclass
class PseudoQueriesConfig:
    """What stands in for a query in training, and how much of it beside real queries (spec section 4)."""

    RENAMED: ClassVar = {"pseudo": "kinds", "queries": "real_share"}

    kinds: list[str] = key(["window"], "kinds of pseudo-queries", choices=KINDS)
    per_document: int = key(20, "pseudo-queries per document and kind", ge=0, le=10_000)
    real_share: float = key(
        0.1, "share of the examples that are real training queries, where there are any", ge=0, le=1
    )
    file: str = key("", "JSON lines {doc_id, text} of an external query generator, for kind file")

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        if ("file" in self.kinds) != bool(self.file):
            return ["kind file in kinds and the key file go together"]
        return []


@dataclass
class LearningRates:
    """Learning rates per paradigm. With several, each trains for a share of the examples and dev chooses."""

    diffusion: list[float] = key([3e-3], "diffusion", gt=0)
    autoregressive: list[float] = key([3e-3], "autoregressive twin", gt=0)
    classifier: list[float] = key([3e-3], "per-level classifiers", gt=0)
    dual: list[float] = key([1e-3], "dual-encoder baseline", gt=0)
    share: float = key(0.2, "share of the examples that a trial of one rate gets", gt=0, le=1)


@dataclass
class EvaluationConfig:
    """What is measured on the test splits."""

    seeds: int = key(1, "training seeds per arm: seed, seed + 1, ...", ge=1, le=20)
    primary: str = key("Hit@10", "measure that claims and choices on dev use", choices=MEASURES)
    depth: int = key(100, "documents per ranked list", ge=1, le=1000)
    steps: list[int] = key([1, 2, 4, 8], "denoising budgets T", ge=1)
    decoders: list[str] = key(["match", "match_rerank"], "decoders swept over the budgets", choices=BUDGETED)
    orders: list[str] = key(["confidence", "random", "left_to_right"], "commit orders at T = L", choices=ORDERS)
    thresholds: list[float] = key([0.5, 0.7, 0.9, 0.99], "confidence thresholds", gt=0, lt=1)
    remask: list[str] = key(["none", "low_conf"], "re-masking rules of the recovery measure", choices=REMASK)
    beams: list[int] = key([10, 100], "beam widths of the twin", ge=1, le=256)
    exhaustive: int = key(
        MOST_EXHAUSTIVE,
        "largest corpus of which the twin scores every document (costs queries x documents); 0: none",
        ge=0,
        le=MOST_EXHAUSTIVE,
    )
    max_queries: int | None = key(None, "test queries per split; null: all", ge=1)
    dev_queries: int = key(200, "dev queries scored while training", ge=1)
    latency_queries: int = key(50, "queries timed one by one, after a warm-up", ge=1)
    resamples: int = key(10_000, "bootstrap resamples", ge=100)
    decisive: bool = key(True, "false: too small to decide; every claim is undecided (smoke)")


@dataclass
class Config(ExperimentConfig):
    """A DiffuGR experiment. The first arm is the main one; it is what gets served by default."""

    RENAMED: ClassVar = RENAMED

    arms: list[str] = key(["diffusion/rq", "autoregressive/rq", "classifier/rq"], "paradigm/family, main arm first")
    data: DataConfig = section(DataConfig)
    docid: DocidConfig = section(DocidConfig)
    model: ModelConfig = section(ModelConfig)
    pseudo_queries: PseudoQueriesConfig = section(PseudoQueriesConfig)
    loss: LossConfig = section(LossConfig)
    learning_rates: LearningRates = section(LearningRates)
    training: TrainingConfig = section(TrainingConfig)
    decode: SearchOptions = section(SearchOptions)
    evaluation: EvaluationConfig = section(EvaluationConfig)

    def problems(self) -> list[str]:
        """Contradictions across sections."""
        problems = []
        for text in self.arms:
            try:
                arm_names.parse(text)
            except ValueError as error:
                problems.append(str(error))
        if not self.arms:
            problems.append("arms is empty; name at least one paradigm/family")
        problems.extend(self._misplaced_arms() if not problems else [])
        if self.model.backbone == "encoder" and self.model.codeword_prior and self.docid.encoder != self.model.encoder:
            problems.append(
                f"docid.encoder={self.docid.encoder} but model.encoder={self.model.encoder}: "
                "the codeword prior needs one encoder for both; or set model.codeword_prior=false"
            )
        problems.extend(self._misplaced_families() if not problems else [])
        return problems or [f"decode: {problem}" for problem in self.decode.misfits(self.code_length)]

    def _misplaced_families(self) -> Iterator[str]:
        """Families of docids that do not go with other sections."""
        families = [arm.docids for arm in self.parsed_arms]
        if self.docid.collision == "append" and any(family.is_text for family in families):
            yield "docid.collision=append is for arms without text docids"
        if self.data.queries == "titles":
            for name in sorted({family.name for family in families if family.titles}):
                yield f"data.queries=titles takes the titles away that docids of family {name} are made of"

    def _misplaced_arms(self) -> Iterator[str]:
        """Arms whose backbone has learned the other way of generating."""
        for arm in self.parsed_arms:
            backbone = self.model.backbone if self.model.reader(arm) == "main" else ""
            if backbone in LANGUAGE_MODELS and arm.paradigm != LANGUAGE_MODELS[backbone].learned:
                learned = LANGUAGE_MODELS[backbone].learned
                yield f"arms: {arm} stands on model.backbone={backbone}, which is for {learned}/ arms only"
        if self.model.ar_base and not any(arm.learner.causal for arm in self.parsed_arms):
            yield f"model.ar_base={self.model.ar_base!r} is for autoregressive arms, of which there is none"

    def evaluation_problems(self) -> list[str]:
        """What of ``decode`` does not go with what the evaluation of a run varies: better known before training."""
        levels = self.code_length
        varied = replace(self.decode, steps=None, threshold=None)
        trials = [("evaluation.steps", replace(varied, steps=min(steps, levels))) for steps in self.evaluation.steps]
        trials += [("evaluation.thresholds", replace(varied, threshold=tau)) for tau in self.evaluation.thresholds]
        trials += [("evaluation.orders", replace(varied, order=order)) for order in self.evaluation.orders]
        trials += [("evaluation.remask", replace(varied, remask=rule)) for rule in self.evaluation.remask]
        for name, options in trials:
            problems = [*options.problems(), *options.misfits(levels)]
            if problems:
                return [f"decode does not go with {name}: {problems[0]}"]
        return []

    def docid_of(self, family: str) -> DocidConfig:
        """The docid settings of a family."""
        return replace(self.docid, family=family)

    def levels_of(self, family: str) -> int:
        """Positions of a family's codes."""
        return code_length(self.docid, family)

    @property
    def code_length(self) -> int:
        """Positions of the main arm's codes."""
        return self.levels_of(self.main.family)

    @property
    def main(self) -> Arm:
        """The first arm."""
        return self.parsed_arms[0]

    @property
    def twin(self) -> Arm | None:
        """The autoregressive arm with the main arm's docids."""
        return next((arm for arm in self.parsed_arms if arm.learner.causal and arm.family == self.main.family), None)

    @property
    def random(self) -> Arm | None:
        """Masked diffusion over random docids."""
        return next((arm for arm in self.parsed_arms if arm == Arm(MaskedDiffusion.name, "random")), None)

    @property
    def parsed_arms(self) -> list[Arm]:
        """The arms, parsed."""
        return [arm_names.parse(text) for text in self.arms]
