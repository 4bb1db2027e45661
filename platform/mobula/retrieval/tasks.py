"""The training tasks of generative retrieval: docid models (diffusion, autoregressive, classifiers), dual encoder.

A task is small and picklable: it holds paths into the run's ``prepared`` folder (see :mod:`.prepare`), which
every worker can read, and opens arrays there when it needs them.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobula.artifacts import sha256
from mobula.config import digest
from mobula.errors import TrainingError
from mobula.portable import Portable
from mobula.retrieval.arms import Arm
from mobula.retrieval.build import ModelConfig, build_model
from mobula.retrieval.docids.families import FAMILIES
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.inputs import StoredFeatures
from mobula.retrieval.listwise import RankedDocids
from mobula.retrieval.network import DocidModel
from mobula.retrieval.paradigms import LossConfig
from mobula.threads import one_thread
from mobula.training.task import Task

# Share of the distinct top-1 predictions that perfect answers have: below it a model is suspected of having
# learned nothing but a favourite; far below it, it has.
SUSPICIOUS = 0.5
COLLAPSED = 0.05
OF_DOCIDS = ("codes", "z", "rates", "docids", "target", "others")  # of a batch; the rest are features of queries
TRAINING = "training"  # folder of the training queries' features
log = logging.getLogger(__name__)


class ModelCollapsed(TrainingError):
    """The model gives nearly every query the same document."""


@dataclass
class Prepared(Portable):
    """Paths and arrays of a prepared folder: training queries, dev queries and docid tables."""

    directory: Path

    def features(self, texts: str, reader: str) -> StoredFeatures:
        """Features of the ``training`` or the ``dev`` queries, for a reader (:meth:`.ModelConfig.reader`)."""
        return StoredFeatures(self.directory / texts / reader)

    @cached_property
    def examples(self) -> np.ndarray:
        """Training examples i64[M, 2]: row of the query, row of its document."""
        return np.load(self.directory / "examples.npy", allow_pickle=False)

    @cached_property
    def dev_gold(self) -> list[set[str]]:
        """Gold document ids of every dev query."""
        text = (self.directory / "dev_gold.txt").read_text(encoding="utf-8")
        return [set(line.split("\t")) for line in text.split("\n")]

    def table(self, family: str) -> DocidTable:
        """The docid table of a family."""
        return DocidTable.load(self.directory / "docids" / family, tokenizer=FAMILIES[family].tokenizer())

    def identity(self) -> str:
        """Hash of everything a task reads."""
        files = {p.relative_to(self.directory): p for p in sorted(self.directory.rglob("*")) if p.is_file()}
        return digest({str(name): sha256(path) for name, path in files.items() if name.parts[0] != TRAINING})


@dataclass
class DocidTask(Task):
    """Train one arm on (query, docid) pairs.

    What is hidden of a docid and the loss are those of the arm's paradigm, see :mod:`.paradigms`.

    ``guarded``: a collapsed model ends the training. One that only tries a learning rate goes on, and dev rejects
    the rate; so do controls, whose codes have no content to learn.
    """

    prepared: Prepared
    arm: Arm
    model: ModelConfig
    objective: LossConfig
    guarded: bool = True

    @cached_property
    def table(self) -> DocidTable:
        """The docids to learn."""
        return self.prepared.table(self.arm.family)

    @cached_property
    def queries(self) -> StoredFeatures:
        """Features of the training queries, pseudo-queries before real ones."""
        return self.prepared.features(TRAINING, self.model.reader(self.arm))

    @cached_property
    def dev(self) -> StoredFeatures:
        """Features of the dev queries used while training."""
        return self.prepared.features("dev", self.model.reader(self.arm))

    @cached_property
    def codes(self) -> Tensor:
        """Codes i64[N, L]."""
        return torch.from_numpy(self.table.codes.astype(np.int64))

    @cached_property
    def ranked(self) -> RankedDocids:
        """The docids that the ranking loss tells apart."""
        return RankedDocids.of(self.codes, self.prepared.examples)

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.prepared.examples)

    def identity(self) -> str:
        """What decides the result besides training configuration and seed."""
        return digest([self.prepared.identity(), asdict(self.arm), asdict(self.model), asdict(self.objective)])

    def build(self) -> DocidModel:
        """A freshly initialised network."""
        return build_model(self.model, self.arm, self.table)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Features, codes i64[B, L], what the network sees of them, and the docids that are ranked.

        See :meth:`.Paradigm.corrupt` and :meth:`.Paradigm.loss`.
        """
        pairs = self.prepared.examples[indices.numpy()]
        codes = self.codes[pairs[:, 1]]
        batch = {**self.queries.rows(pairs[:, 0]), "codes": codes, **self.arm.learner.corrupt(codes, generator)}
        if not self.arm.learner.ranks(self.objective):
            return batch
        if self.arm.learner.causal:
            return batch | self.ranked.drawn(pairs, self.objective.negatives, generator)
        return batch | self.ranked.all(pairs, self.objective.candidates, generator)

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor]
    ) -> tuple[Tensor | dict[str, Tensor], dict[str, Tensor | float]]:
        """Mean losses of a batch in nats."""
        query = {name: batch[name] for name in batch if name not in OF_DOCIDS}
        losses = self.arm.learner.loss(partial(model, query), batch, self.objective)
        return (losses if len(losses) > 1 else next(iter(losses.values()))), {}

    def evaluate(self, model: DocidModel) -> dict[str, float]:
        """Dev Hit@1 and Hit@10, and the share of distinct top-1 documents (by one_pass, or beam 10)."""
        query = {name: values.to(_device(model)) for name, values in self.dev.all().items()}
        decoder = self.arm.learner.decoder(model, self.table)
        with one_thread():
            results = decoder.search(query, [self.arm.learner.dev] * len(self.prepared.dev_gold))
        rankings = [[hit.doc_id for hit in result.hits] for result in results]
        return dev_measures(rankings, self.prepared.dev_gold)

    def check(self, metrics: dict[str, float], step: int, steps: int) -> None:
        """See :func:`check_collapse`."""
        fatal = self.guarded and not self.arm.docids.is_control
        check_collapse(str(self.arm), metrics["distinct_top1"], self.prepared.dev_gold, step, steps, fatal=fatal)


class DualEncoder(nn.Module):
    """Query and document maps over a frozen encoder's vectors, both the identity at the start."""

    def __init__(self, dim: int, temperature: float = 0.05) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        self.document = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.document.weight)
        self.log_scale = nn.Parameter(torch.tensor([1 / temperature]).log())  # DeepSpeed takes no 0-d parameter

    def embed_queries(self, vectors: Tensor) -> Tensor:
        """Unit vectors [B, D] of queries."""
        return F.normalize(vectors + self.query(vectors), dim=-1)

    def embed_documents(self, vectors: Tensor) -> Tensor:
        """Unit vectors [N, D] of documents."""
        return F.normalize(vectors + self.document(vectors), dim=-1)

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Similarities [B, B'] times the learned inverse temperature."""
        return self.log_scale.exp() * self.embed_queries(queries) @ self.embed_documents(documents).T


@dataclass
class DualTask(Task):
    """Train the dual-encoder baseline with in-batch negatives on the same examples as the docid models.

    ``negatives`` names an array i64[M] in the prepared folder: for each example the row of a document that looks
    right and is not, one more column for every query of the batch (DPR, Karpukhin et al. 2020). Empty: none.
    """

    prepared: Prepared
    guarded: bool = True
    negatives: str = ""

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.prepared.examples)

    @cached_property
    def hard(self) -> np.ndarray | None:
        """Rows i64[M] of hard negatives."""
        return np.load(self.prepared.directory / self.negatives, allow_pickle=False) if self.negatives else None

    @cached_property
    def documents(self) -> Tensor:
        """Document vectors f32[N, D]."""
        return torch.from_numpy(np.load(self.prepared.directory / "documents.npy", allow_pickle=False))

    @cached_property
    def query_vectors(self) -> np.ndarray:
        """Vectors of the training queries, memory-mapped f16[V, D]."""
        return np.load(self.prepared.directory / "training_vectors.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def dev_vectors(self) -> Tensor:
        """Vectors of the dev queries f32[Q, D]."""
        return torch.from_numpy(np.load(self.prepared.directory / "dev_vectors.npy", allow_pickle=False))

    @cached_property
    def doc_ids(self) -> list[str]:
        """Document ids by row."""
        return (self.prepared.directory / "doc_ids.txt").read_text(encoding="utf-8").split("\n")

    def identity(self) -> str:
        """What decides the result besides training configuration and seed."""
        return digest([self.prepared.identity(), "dual", self.negatives])

    def build(self) -> DualEncoder:
        """A dual encoder that starts as the frozen encoder."""
        return DualEncoder(self.documents.shape[1])

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Query vectors f32[B, D], document vectors f32[B', D] and their rows i64[B'], each query's own first."""
        pairs = self.prepared.examples[indices.numpy()]
        queries = torch.from_numpy(np.asarray(self.query_vectors[pairs[:, 0]], dtype=np.float32))
        rows = pairs[:, 1] if self.hard is None else np.concatenate([pairs[:, 1], self.hard[indices.numpy()]])
        return {"queries": queries, "documents": self.documents[rows], "rows": torch.from_numpy(rows)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """InfoNCE; the same document standing twice in a batch is not its own negative."""
        similarity = model(batch["queries"], batch["documents"])
        rows = batch["rows"]
        own = torch.arange(len(similarity), device=rows.device)
        same = rows[: len(own), None] == rows
        same[own, own] = False
        return F.cross_entropy(similarity.masked_fill(same, float("-inf")), own), {}

    def check(self, metrics: dict[str, float], step: int, steps: int) -> None:
        """See :func:`check_collapse`."""
        check_collapse("dual", metrics["distinct_top1"], self.prepared.dev_gold, step, steps, fatal=self.guarded)

    @torch.inference_mode()
    def evaluate(self, model: DualEncoder) -> dict[str, float]:
        """Dev Hit@1, Hit@10 and the share of distinct top-1 documents."""
        device = _device(model)
        documents = model.embed_documents(self.documents.to(device))
        scores = model.embed_queries(self.dev_vectors.to(device)) @ documents.T
        top = scores.topk(min(10, scores.shape[1])).indices.tolist()
        return dev_measures([[self.doc_ids[row] for row in rows] for rows in top], self.prepared.dev_gold)


def check_collapse(name: str, distinct: float, gold: list[set[str]], step: int, steps: int, *, fatal: bool) -> None:
    """Collapse guard (spec 4), in the second half of training: warns, and in the worst case raises if ``fatal``.

    ``distinct`` is the share of distinct top-1 documents; it is compared with the share that perfect answers
    have, since several queries may ask for one document.

    Raises:
        ModelCollapsed: if it is less than 5 % of that.
    """
    wanted = min(len(gold), len(set().union(*gold))) / len(gold)
    if step <= steps / 2 or distinct >= SUSPICIOUS * wanted:
        return
    finding = (
        f"{name}: {distinct:.1%} distinct top-1 documents on dev at step {step}, perfect answers have {wanted:.1%}"
    )
    if fatal and distinct < COLLAPSED * wanted:
        raise ModelCollapsed(f"{finding}; the model has collapsed: the learning rate is probably too high")
    log.warning("%s; the model may be collapsing", finding)


def dev_measures(rankings: list[list[str]], gold: list[set[str]]) -> dict[str, float]:
    """Hit@1, Hit@10, MRR@10 and the share of distinct top-1 documents of ranked ids (at most 10 per query)."""
    ranks = np.array(
        [
            next((1 + i for i, doc_id in enumerate(ids) if doc_id in g), np.inf)
            for ids, g in zip(rankings, gold, strict=True)
        ]
    )
    return {
        "hit@1": float(np.mean(ranks == 1)),
        "hit@10": float(np.mean(ranks <= 10)),
        "mrr@10": float(np.mean(1 / ranks)),
        "distinct_top1": len({ids[0] for ids in rankings}) / len(rankings),
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
