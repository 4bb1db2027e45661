"""The retrievers of a `dynamic_retrieval` run, as they stand before anything arrives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mobula.data.views import body
from mobula.models.text import load_static
from mobula.retrieval.build import load_weights
from mobula.retrieval.dense import Dense
from mobula.retrieval.docids.code_only import CodeOnlyRetriever
from mobula.retrieval.docids.families import FAMILIES
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.dynamic.config import HYBRID, MULTI, Config
from mobula.retrieval.dynamic.fitting import Trained, multi_name
from mobula.retrieval.dynamic.hybrid import HybridRetriever, tune_weight
from mobula.retrieval.dynamic.multi import MultiConfig, MultiDocidRetriever
from mobula.retrieval.lexical import Bm25, tune
from mobula.retrieval.ngrams.retriever import load as load_ngrams
from mobula.retrieval.paradigms import PARADIGMS
from mobula.retrieval.prepare import Material
from mobula.retrieval.retrievers import DocidRetriever, DualRetriever
from mobula.retrieval.search import Retriever, SearchOptions
from mobula.training import FitResult


@dataclass(frozen=True)
class System:
    """A row of the comparison: how its retriever is made, fresh, for a seed, and how it searches.

    ``trained``: one retriever for every seed; the others are the same for all. ``width``: candidates that it really
    ranks; None: all documents.
    """

    name: str
    make: Callable[[int], Retriever]
    options: SearchOptions
    trained: bool
    width: int | None = None


def systems(config: Config, trained: Trained) -> list[System]:
    """Every system of the config, variants included, in the order of ``systems``."""
    found: list[System] = []
    for name in config.systems:
        found.extend(_BUILDERS.get(name, _docid_systems)(config, trained, name))
    return found


def search_options(config: Config, paradigm: str) -> SearchOptions:
    """How docid models of a paradigm search: a beam of ``evaluation.beam``, or all documents by one pass."""
    return replace(PARADIGMS[paradigm].dev, k=config.evaluation.depth, beam=config.evaluation.beam)


def _bm25(config: Config, trained: Trained, name: str) -> list[System]:
    data = trained.documents.data
    chosen, _ = tune(data.documents, data.queries["dev"])
    k1, b = chosen.k1, chosen.b
    return [_baseline(config, name, lambda _: Bm25(data.documents, k1, b))]


def _dense(config: Config, trained: Trained, name: str) -> list[System]:
    material = trained.documents
    return [_baseline(config, name, lambda _: Dense(material.encoder, material.data.documents, material.embeddings))]


def _dual(config: Config, trained: Trained, name: str) -> list[System]:
    material = trained.documents
    ids = [document.id for document in material.data.documents]

    def make(_: int) -> Retriever:
        model = _load(trained, name, 0)
        return DualRetriever(model, material.encoder, ids, material.embeddings)

    return [_baseline(config, name, make)]


def _adc(config: Config, trained: Trained, name: str) -> list[System]:
    """Code-only retrieval for every quantised family of the arms."""
    material = trained.documents

    def make(family: str) -> Callable[[int], Retriever]:
        table = material.prepared.table(family)
        return lambda _: CodeOnlyRetriever("adc", table, material.encoder, body)

    families = dict.fromkeys(arm.family for arm in config.parsed_arms if FAMILIES[arm.family].is_quantised)
    return [_baseline(config, f"{name}/{family}", make(family)) for family in families]


def _docid_systems(config: Config, trained: Trained, name: str) -> list[System]:
    paradigm, _, family = name.partition("/")
    if family == MULTI:
        return _multi(config, trained, paradigm)
    material = trained.documents

    def make(seed: int) -> Retriever:
        model = _load(trained, name, seed)
        reader = config.model.reader(trained.tasks[name].arm)
        table: DocidTable = trained.tasks[name].table
        return DocidRetriever(name, model, table, material.inputs[reader], material.encoder)

    options = search_options(config, paradigm)
    return [System(name, make, options, trained=True, width=_width(options))]


def _multi(config: Config, trained: Trained, paradigm: str) -> list[System]:
    options = search_options(config, paradigm)
    width = _width(options)
    found = []
    for count in trained.chunks:
        name = multi_name(config, paradigm, count)
        found.append(System(name, _multi_maker(config, trained, name, count, config.multi), options, True, width))
        if count != config.chunks.per_document:
            continue
        for text in config.evaluation.variants:
            make = _multi_maker(config, trained, name, count, config.variant(text))
            found.append(System(f"{name} {text}", make, options, True, width))
    return found


def _multi_maker(
    config: Config, trained: Trained, name: str, count: int, settings: MultiConfig
) -> Callable[[int], Retriever]:
    material: Material = trained.chunks[count]
    chunks = replace(config.chunks, per_document=count)

    def make(seed: int) -> Retriever:
        task = trained.tasks[name]
        inputs = material.inputs[config.model.reader(task.arm)]
        model, tokenizer = _load(trained, name, seed), load_static("wordllama")
        return MultiDocidRetriever(
            name, model, task.table, inputs, material.encoder, tokenizer, chunks, settings, material.embeddings
        )

    return make


def _ngrams(config: Config, trained: Trained, name: str) -> list[System]:
    def make(seed: int) -> Retriever:
        return load_ngrams(trained.ngrams[name].directory, trained.results[name][seed].weights, name)

    return [System(name, make, SearchOptions(k=config.evaluation.depth), trained=True)]


def _hybrid(config: Config, trained: Trained, name: str) -> list[System]:
    """The first numeric system fused with ngram; the weight is chosen on dev of the initial documents."""
    numeric = next(system for system in config.systems if "/" in system)
    (left,) = [s for s in _docid_systems(config, trained, numeric) if s.name == numeric]
    (right,) = _ngrams(config, trained, "ngram")
    fusion = config.fusion

    def make(seed: int) -> Retriever:
        parts = (left.make(seed), right.make(seed))
        dev = trained.documents.data.queries["dev"]
        weight = tune_weight(parts, left.options, dev, fusion.rule) if fusion.weight is None else fusion.weight
        return HybridRetriever(f"{name} {numeric}+ngram", parts, left.options, weight, fusion.rule)

    return [System(name, make, left.options, trained=True)]


def _load(trained: Trained, name: str, seed: int) -> Any:
    result: FitResult = trained.results[name][seed]
    model = trained.tasks[name].build()
    load_weights(model, result.weights)
    return model.eval()


def _width(options: SearchOptions) -> int | None:
    return options.beam if options.decoder == "beam" else None


def _baseline(config: Config, name: str, make: Callable[[int], Retriever]) -> System:
    return System(name, make, SearchOptions(k=config.evaluation.depth), trained=False)


_BUILDERS: dict[str, Callable[[Config, Trained, str], list[System]]] = {
    "bm25": _bm25,
    "dense": _dense,
    "dual": _dual,
    "dual_hn": _dual,
    "adc": _adc,
    "ngram": _ngrams,
    "multiview": _ngrams,
    HYBRID: _hybrid,
}
