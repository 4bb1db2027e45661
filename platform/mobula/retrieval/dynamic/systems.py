"""The retrievers of a `dynamic_retrieval` run, as they stand before anything arrives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from mobula.data.views import body
from mobula.models.text import load_static
from mobula.retrieval.dense import Dense
from mobula.retrieval.docids.code_only import CodeOnlyRetriever
from mobula.retrieval.docids.families import FAMILIES
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.dynamic.config import HYBRID, MULTI, Config, SessionSystem, options_of
from mobula.retrieval.dynamic.hybrid import HybridRetriever, tune_weight
from mobula.retrieval.dynamic.multi import MultiConfig, MultiDocidRetriever
from mobula.retrieval.dynamic.train_systems import Trained
from mobula.retrieval.lexical import Bm25, tune
from mobula.retrieval.ngrams.retriever import load as load_ngrams
from mobula.retrieval.paradigms import PARADIGMS
from mobula.retrieval.prepare import Material
from mobula.retrieval.retrievers import DocidRetriever, DualRetriever
from mobula.retrieval.search import Retriever, SearchOptions
from mobula.retrieval.train_arms import load_arm


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
    """Every system of the config, variants included, in the order of ``systems``."""
    built = (_BUILDERS.get(name, _docid_systems)(config, trained, name) for name in config.systems)
    return {spec.system: spec for spec in itertools.chain(*built)}


def search_options(config: Config, paradigm: str) -> SearchOptions:
    """How docid models of a paradigm search: a beam of ``evaluation.beam``, or all documents by one pass."""
    return replace(PARADIGMS[paradigm].dev, k=config.evaluation.depth, beam=config.evaluation.beam)


def _bm25(config: Config, trained: Trained, name: str) -> list[RetrieverSpec]:
    data = trained.documents.data
    chosen, _ = tune(data.documents, data.queries["dev"])
    k1, b = chosen.k1, chosen.b
    return [_baseline(config, name, lambda _: Bm25(data.documents, k1, b))]


def _dense(config: Config, trained: Trained, name: str) -> list[RetrieverSpec]:
    material = trained.documents
    return [_baseline(config, name, lambda _: Dense(material.encoder, material.data.documents, material.embeddings))]


def _dual(config: Config, trained: Trained, name: str) -> list[RetrieverSpec]:
    material = trained.documents
    ids = [document.id for document in material.data.documents]

    def make(_: int) -> Retriever:
        model = load_arm(trained.tasks[name], trained.results[name][0])
        return DualRetriever(model, material.encoder, ids, material.embeddings)

    return [_baseline(config, name, make)]


def _adc(config: Config, trained: Trained, name: str) -> list[RetrieverSpec]:
    """Code-only retrieval for every quantised family of the arms."""
    material = trained.documents

    def make(family: str) -> Callable[[int], Retriever]:
        table = material.prepared.table(family)
        return lambda _: CodeOnlyRetriever("adc", table, material.encoder, body)

    families = dict.fromkeys(arm.family for arm in config.parsed_arms if FAMILIES[arm.family].is_quantised)
    return [_baseline(config, f"{name}/{family}", make(family)) for family in families]


def _docid_systems(config: Config, trained: Trained, name: str) -> list[RetrieverSpec]:
    paradigm, _, family = name.partition("/")
    if family == MULTI:
        return _multi(config, trained, paradigm)
    material = trained.documents

    def make(seed: int) -> Retriever:
        model = load_arm(trained.tasks[name], trained.results[name][seed])
        reader = config.model.reader(trained.tasks[name].arm)
        table: DocidTable = trained.tasks[name].table
        return DocidRetriever(name, model, table, material.inputs[reader], material.encoder)

    options = search_options(config, paradigm)
    return [RetrieverSpec(SessionSystem(name), make, options, trained=True, width=_width(options))]


def _multi(config: Config, trained: Trained, paradigm: str) -> list[RetrieverSpec]:
    options = search_options(config, paradigm)
    width = _width(options)
    specs = []
    for count in trained.chunks:
        system = config.multi_system(paradigm, count)
        variants = {system: config.multi}
        if count == config.chunks.per_document:
            variants |= {
                SessionSystem(system.arm, options_of(v)): config.variant(v) for v in config.evaluation.variants
            }
        for variant, settings in variants.items():
            make = _multi_maker(config, trained, system.label, count, settings)
            specs.append(RetrieverSpec(variant, make, options, True, width))
    return specs


def _multi_maker(
    config: Config, trained: Trained, name: str, count: int, settings: MultiConfig
) -> Callable[[int], Retriever]:
    material: Material = trained.chunks[count]
    chunks = replace(config.chunks, per_document=count)

    def make(seed: int) -> Retriever:
        task = trained.tasks[name]
        inputs = material.inputs[config.model.reader(task.arm)]
        model, tokenizer = load_arm(trained.tasks[name], trained.results[name][seed]), load_static("wordllama")
        return MultiDocidRetriever(
            name, model, task.table, inputs, material.encoder, tokenizer, chunks, settings, material.embeddings
        )

    return make


def _ngrams(config: Config, trained: Trained, name: str) -> list[RetrieverSpec]:
    def make(seed: int) -> Retriever:
        return load_ngrams(trained.ngrams[name].directory, trained.results[name][seed].weights, name)

    return [RetrieverSpec(SessionSystem(name), make, SearchOptions(k=config.evaluation.depth), trained=True)]


def _hybrid(config: Config, trained: Trained, name: str) -> list[RetrieverSpec]:
    """The first numeric system fused with ngram; the weight is chosen on dev of the initial documents."""
    numeric = next(system for system in config.systems if "/" in system)
    (left,) = _docid_systems(config, trained, numeric)[:1]
    (right,) = _ngrams(config, trained, "ngram")
    fusion = config.fusion

    def make(seed: int) -> Retriever:
        parts = (left.make(seed), right.make(seed))
        dev = trained.documents.data.queries["dev"]
        weight = tune_weight(parts, left.options, dev, fusion.rule) if fusion.weight is None else fusion.weight
        return HybridRetriever(f"{name} {numeric}+ngram", parts, left.options, weight, fusion.rule)

    return [RetrieverSpec(SessionSystem(name), make, left.options, trained=True)]


def _width(options: SearchOptions) -> int | None:
    return options.beam if options.decoder == "beam" else None


def _baseline(config: Config, name: str, make: Callable[[int], Retriever]) -> RetrieverSpec:
    return RetrieverSpec(SessionSystem(name), make, SearchOptions(k=config.evaluation.depth), trained=False)


_BUILDERS: dict[str, Callable[[Config, Trained, str], list[RetrieverSpec]]] = {
    "bm25": _bm25,
    "dense": _dense,
    "dual": _dual,
    "dual_hn": _dual,
    "adc": _adc,
    "ngram": _ngrams,
    "multiview": _ngrams,
    HYBRID: _hybrid,
}
