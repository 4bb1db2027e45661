"""The retrievers of a `dynamic_retrieval` run, as they stand before anything arrives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mobula.data.pseudo_queries import body
from mobula.models.text import load_static
from mobula.retrieval.dense import Dense
from mobula.retrieval.docids.code_only import CodeOnlyRetriever
from mobula.retrieval.dynamic.config import HYBRID, MULTI, Config, SessionSystem
from mobula.retrieval.dynamic.multi import MultiDocidRetriever
from mobula.retrieval.dynamic.train_systems import Trained
from mobula.retrieval.fusion import HybridRetriever, tune_weight
from mobula.retrieval.lexical import Bm25, tune
from mobula.retrieval.ngrams.retriever import load as load_ngrams
from mobula.retrieval.paradigms import PARADIGMS
from mobula.retrieval.prepare import Material
from mobula.retrieval.retrievers import DocidRetriever, DualRetriever
from mobula.retrieval.search import Retriever, SearchOptions


@dataclass(frozen=True)
class RetrieverSpec:
    """How a system's retriever is made, fresh, for a seed, and how it searches.

    ``trained``: one retriever for every seed; the others are the same for all. ``width``: candidates that it really
    ranks; None: all documents.
    """

    system: SessionSystem
    make: Callable[[int], Retriever]
    options: SearchOptions
    trained: bool
    width: int | None = None


def systems(config: Config, trained: Trained) -> dict[SessionSystem, RetrieverSpec]:
    """Every system of the config, in the order of ``systems``."""
    built = (_BUILDERS.get(system.arm, _docids)(config, trained, system.label) for system in config.parsed)
    return {spec.system: spec for spec in itertools.chain(*built)}


def _bm25(config: Config, trained: Trained, name: str) -> Iterator[RetrieverSpec]:
    data = trained.documents.data
    chosen, _ = tune(data.documents, data.queries["dev"])
    yield _baseline(config, name, lambda _: Bm25(data.documents, chosen.k1, chosen.b))


def _dense(config: Config, trained: Trained, name: str) -> Iterator[RetrieverSpec]:
    material = trained.documents
    yield _baseline(config, name, lambda _: Dense(material.encoder, material.data.documents, material.embeddings))


def _dual(config: Config, trained: Trained, name: str) -> Iterator[RetrieverSpec]:
    material = trained.documents
    ids = [document.id for document in material.data.documents]
    yield _baseline(
        config, name, lambda _: DualRetriever(trained.model(name, 0), material.encoder, ids, material.embeddings)
    )


def _adc(config: Config, trained: Trained, name: str) -> Iterator[RetrieverSpec]:
    """Code-only retrieval (ADC) for every quantised family of the arms."""
    material = trained.documents

    def make(family: str) -> Callable[[int], Retriever]:
        table = material.prepared.table(family)
        return lambda _: CodeOnlyRetriever("adc", table, material.encoder, body)

    for family in dict.fromkeys(arm.family for arm in config.parsed_arms if arm.docids.is_quantised):
        yield _baseline(config, f"{name}/{family}", make(family))


def _docids(config: Config, trained: Trained, name: str) -> Iterator[RetrieverSpec]:
    system = SessionSystem.parse(name)
    if system.family == MULTI:
        yield _decoded(config, system, _multi_maker(config, trained, system))
    else:
        yield _decoded(config, system, lambda seed: _docid_retriever(config, trained, trained.documents, name, seed))


def _multi_maker(config: Config, trained: Trained, system: SessionSystem) -> Callable[[int], Retriever]:
    own, name = config.own(system), system.trained.label
    material = trained.chunks[own.chunks.per_document]

    def make(seed: int) -> Retriever:
        docids = _docid_retriever(config, trained, material, name, seed)
        return MultiDocidRetriever(name, docids, load_static("wordllama"), own.chunks, own.multi, material.embeddings)

    return make


def _docid_retriever(config: Config, trained: Trained, material: Material, name: str, seed: int) -> DocidRetriever:
    task = trained.tasks[name]
    inputs = material.inputs[config.model.reader(task.arm)]
    return DocidRetriever(str(task.arm), trained.model(name, seed), task.table, inputs, material.encoder)


def _ngrams(config: Config, trained: Trained, name: str) -> Iterator[RetrieverSpec]:
    def make(seed: int) -> Retriever:
        return load_ngrams(trained.ngrams[name].directory, trained.results[name][seed].weights, name)

    yield RetrieverSpec(SessionSystem.parse(name), make, SearchOptions(k=config.evaluation.depth), trained=True)


def _hybrid(config: Config, trained: Trained, name: str) -> Iterator[RetrieverSpec]:
    """The first numeric system fused with ngram; the weight is chosen on dev of the initial documents."""
    numeric = next(name for name in config.systems if "/" in name and " " not in name)
    left, right = next(_docids(config, trained, numeric)), next(_ngrams(config, trained, "ngram"))
    fusion = config.fusion

    def make(seed: int) -> Retriever:
        parts = (left.make(seed), right.make(seed))
        dev = trained.documents.data.queries["dev"]
        weight = tune_weight(parts, left.options, dev, fusion.rule) if fusion.weight is None else fusion.weight
        return HybridRetriever(f"{name} {numeric}+ngram", parts, left.options, weight, fusion.rule)

    yield RetrieverSpec(SessionSystem(name), make, left.options, trained=True)


def _baseline(config: Config, name: str, make: Callable[[int], Retriever]) -> RetrieverSpec:
    return RetrieverSpec(SessionSystem(name), make, SearchOptions(k=config.evaluation.depth), trained=False)


def _decoded(config: Config, system: SessionSystem, make: Callable[[int], Retriever]) -> RetrieverSpec:
    """A docid model that searches with a beam of ``evaluation.beam``, or all documents by one pass."""
    evaluation = config.evaluation
    options = replace(PARADIGMS[system.paradigm].dev, k=evaluation.depth, beam=evaluation.beam)
    return RetrieverSpec(system, make, options, True, options.beam if options.decoder == "beam" else None)


_BUILDERS: dict[str, Callable[[Config, Trained, str], Iterator[RetrieverSpec]]] = {
    "bm25": _bm25,
    "dense": _dense,
    "dual": _dual,
    "dual_hn": _dual,
    "adc": _adc,
    "ngram": _ngrams,
    "multiview": _ngrams,
    HYBRID: _hybrid,
}
