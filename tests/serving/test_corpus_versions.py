"""A trained library that grows and shrinks: one version for all its retrievers, nothing trained changes."""

import asyncio
import hashlib
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch

from mobula import artifacts, methods
from mobula.data.records import Document
from mobula.errors import DataError
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.space import fit_space
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.search import SearchOptions
from tests.serving.asgi import client, make

NEW = [Document(f"new{i}", "zyzzyva", f"zyzzyva weevil number {i} of the palm groves") for i in range(4)]


@pytest.fixture(scope="module")
def library(trained_artifact):
    artifact = artifacts.open_artifact(trained_artifact)
    return methods.get(artifact.method).load(artifact)


def ids(library, name, query="zyzzyva weevil", k=1000):
    retriever = library.retrievers[name]
    options = SearchOptions(k=k, decoder=(*retriever.decoders, "match_rerank")[0])
    return [hit.doc_id for hit in retriever.search([query], [options])[0].hits]


def trained(library):
    """A hash of everything that was trained or fitted."""
    digest = hashlib.sha256()
    for name, retriever in library.retrievers.items():
        digest.update(name.encode())
        if isinstance(model := getattr(retriever, "model", None), torch.nn.Module):
            for key, value in model.state_dict().items():
                digest.update(key.encode() + value.numpy().tobytes())
        if (table := getattr(retriever, "table", None)) is not None:
            digest.update(table.space.hash.encode() + table.hash.encode())
            for array in table.space.arrays.values():
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def codes(library):
    return {doc_id: library.document(doc_id)["code"] for doc_id in library.documents}


def test_every_retriever_is_at_the_same_version(library):
    before = set(library.documents)
    grown, admission = library.insert(NEW)
    less = grown.remove([NEW[0].id, min(before)])
    assert set(library.retrievers) >= {"diffusion/rq", "autoregressive/rq", "classifier/rq", "adc", "bm25", "dense"}
    for name in library.retrievers:
        assert set(ids(library, name)) == before == set(library.documents), name
        assert set(ids(grown, name)) == before | {d.id for d in NEW} == set(grown.documents), name
        assert set(ids(less, name)) == set(grown.documents) - {NEW[0].id, min(before)} == set(less.documents), name
    for name in ("bm25", "dense"):
        assert set(ids(grown, name, k=4)) == {d.id for d in NEW}
    assert admission.codes == {d.id: codes(grown)[d.id] for d in NEW}
    shared = [list(codes(grown).values()).count(code) > 1 for code in admission.codes.values()]
    assert (admission.collisions, admission.overflow) == (sum(shared), 0)


def test_nothing_trained_changes_and_no_code_of_another_document(library):
    """Spec, test 1: hashes of weights and codebooks, and old codes, are the same after documents came and went."""
    before, old = trained(library), codes(library)
    now = library
    for _ in range(2):
        now, admission = now.insert(NEW)
        assert {i: c for i, c in codes(now).items() if i in old} == old
        assert codes(now) == {**old, **admission.codes}
        now = now.remove([d.id for d in NEW])
    assert trained(now) == trained(library) == before
    assert codes(now) == old
    leaving = sorted(old)[:5]
    back, admission = now.remove(leaving).insert([library.documents[i] for i in leaving])
    assert codes(back) == old and trained(back) == before
    assert {i: admission.codes[i] for i in leaving} == {i: old[i] for i in leaving}


def test_change_that_one_retriever_refuses_is_in_none(library, monkeypatch):
    order = {name: ids(library, name) for name in library.retrievers}

    def broken(*_):
        raise RuntimeError("no room")

    with monkeypatch.context() as patched:
        last = list(library.retrievers)[-1]
        for method in ("insert", "remove"):
            patched.setattr(type(library.retrievers[last]), method, broken)
        with pytest.raises(RuntimeError, match="no room"):
            library.insert(NEW)
        with pytest.raises(RuntimeError, match="no room"):
            library.remove([min(library.documents)])
    for refused in ([NEW[0], NEW[0]], [NEW[0], next(iter(library.documents.values()))]):
        with pytest.raises(DataError):
            library.insert(refused)
    for refused in (["nobody"], [min(library.documents)] * 2):
        with pytest.raises(DataError):
            library.remove(refused)
    assert {name: ids(library, name) for name in library.retrievers} == order


def test_retriever_that_must_be_trained_keeps_what_it_knows_and_loses_what_is_removed(library):
    class Atomic:
        decoders = ()

        def __init__(self, documents):
            space = fit_space(DocidConfig(family="atomic"), documents, None, seed=0)
            self.table = DocidTable.build(space, documents)

        def remove(self, doc_ids):
            self.table = self.table.delete(doc_ids)

    known = list(library.documents.values())
    mixed = replace(library, retrievers={**library.retrievers, "classifier/atomic": Atomic(known)})
    now, _ = mixed.insert(NEW)
    now = now.remove([NEW[0].id, known[0].id])
    assert set(now.retrievers["classifier/atomic"].table.rows) == {d.id for d in known[1:]}
    assert set(ids(now, "bm25")) == {d.id for d in [*known[1:], *NEW[1:]]}
    assert set(mixed.retrievers["classifier/atomic"].table.rows) == set(library.documents)


def test_documents_are_embedded_once_for_all_retrievers(library, monkeypatch):
    calls = []
    embed = type(library.encoder.encoder).embed

    def counted(self, texts, batch=64):
        calls.append(list(texts))
        return embed(self, texts, batch)

    monkeypatch.setattr(type(library.encoder.encoder), "embed", counted)
    library.insert(NEW)
    assert len(calls) == 1 and len(calls[0]) == len(NEW)


def test_concurrent_add_and_search_of_a_trained_model(library, tmp_path):
    """Spec, test 21, with every kind of retriever: hits and titles are those of the version that the answer names."""
    app, state = make(tmp_path, library, added=tmp_path / "added")
    initial = {d.id: d.title for d in library.documents.values()}
    victims = sorted(initial)[:10]
    requests, states = [], [dict(initial)]
    for turn in range(10):
        title = f"zyzzyva {turn}"
        requests.append(("/documents", {"documents": [{"id": f"z{turn}", "title": title, "text": "zyzzyva weevil"}]}))
        states.append({**states[-1], f"z{turn}": title})
        gone = victims[turn] if turn % 2 else f"z{turn - turn // 2}"
        requests.append(("/documents/remove", {"ids": [gone]}))
        states.append({i: t for i, t in states[-1].items() if i != gone})
    names, numbers, seen = list(library.retrievers), count(), set()

    async def write(http):
        for path, body in requests:
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            await asyncio.sleep(0.02)

    async def read(http):
        while (number := next(numbers)) < 200:
            name = names[number % len(names)]
            answer = await http.post("/search", json={"query": "zyzzyva", "k": 100, "retriever": name})
            assert answer.status_code == 200, answer.text
            expected, hits = states[answer.json()["version"]], answer.json()["hits"]
            assert len(hits) == min(100, len(expected))
            assert all(expected[hit["doc_id"]] == hit["title"] for hit in hits), name
            marked = {i for i in expected if i.startswith("z") and i not in initial}
            if name in ("bm25", "dense"):
                assert {hit["doc_id"] for hit in hits[: len(marked)]} == marked
            seen.add(answer.json()["version"])

    async def run():
        async with client(app) as http:
            await asyncio.gather(write(http), *(read(http) for _ in range(4)))

    asyncio.run(run())
    assert state.corpus.snapshot.version == 20 and len(seen) > 5
    assert set(state.corpus.searchable.documents) == set(states[-1])
