"""Tables that grow: rows and look-ups are shared between versions, and every version sees its own documents."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobula.data.records import Document
from mobula.models.text import StaticEmbedding
from mobula.retrieval.decoding.corpus import Corpus
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.growing import SortedRuns
from mobula.retrieval.docids.space import fit_space
from mobula.retrieval.docids.table import DocidTable

SMALL = DocidConfig(family="rq", levels=3, codes=16)


def documents(names: Sequence[str]) -> list[Document]:
    return [Document(name, "", name) for name in names]


def random_table(count: int, levels: int = 3, codes: int = 6) -> DocidTable:
    """Random codes that differ; documents that arrive are given theirs by name."""
    first = documents([f"first{i}" for i in range(count)])
    config = DocidConfig(family="random", levels=levels, codes=codes)
    return DocidTable.build(fit_space(config, first, None, seed=0), first)


def alone(table: DocidTable) -> DocidTable:
    """A copy that shares nothing."""
    copies = {"codes": table.codes.copy(), "doc_ids": list(table.doc_ids), "live": table.live.copy()}
    return replace(table, **copies)


def require_same(table: DocidTable) -> None:
    """Look-ups of a version equal those built of its rows from nothing."""
    found, expected = Corpus.of(table), Corpus.of(alone(table))
    assert list(found.doc_ids) == list(expected.doc_ids)
    assert dict(found.table.rows) == dict(expected.table.rows)
    np.testing.assert_array_equal(found.columns, expected.columns)
    codes = np.unique(expected.columns.T, axis=0)
    partial = np.where(np.random.default_rng(0).random(codes.shape) < 0.5, codes, -1)
    for one in (codes, partial):
        valid = found.bitset.of_codes(one)
        np.testing.assert_array_equal(valid, expected.bitset.of_codes(one))
        np.testing.assert_array_equal(found.bitset.allowed_all(valid), expected.bitset.allowed_all(valid))
        np.testing.assert_array_equal(found.bitset.allowed(valid, 0), expected.bitset.allowed(valid, 0))
    everything = found.bitset.all_valid(1)
    np.testing.assert_array_equal(found.bitset.allowed_all(everything), expected.bitset.allowed_all(everything))
    nodes, wanted = (corpus.trie.root(len(codes)) for corpus in (found, expected))
    for level in range(table.levels):
        np.testing.assert_array_equal(found.trie.mask(nodes), expected.trie.mask(wanted))
        nodes, wanted = found.trie.step(nodes, codes[:, level]), expected.trie.step(wanted, codes[:, level])
    for code, leaf, same in zip(codes, nodes.tolist(), wanted.tolist(), strict=True):
        np.testing.assert_array_equal(found.trie.documents(leaf), expected.trie.documents(same))
        np.testing.assert_array_equal(found.bucket(code), np.flatnonzero((code == found.columns.T).all(1)))


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(st.integers(0, 70), min_size=1, max_size=8), used=st.booleans(), leaving=st.booleans())
def test_every_version_sees_its_own_documents(batches: list[int], used: bool, leaving: bool) -> None:
    versions = [random_table(5, levels=3, codes=32)]
    for number, size in enumerate(batches):
        if used:
            require_same(versions[-1])
        if leaving and number == 3:
            versions.append(versions[-1].delete(list(versions[-1].rows)[::3]))
        arriving = documents([f"{number}/{i}" for i in range(size)])
        fresh, report = alone(versions[-1]).insert(arriving)
        grown, same = versions[-1].insert(arriving)
        np.testing.assert_array_equal(grown.codes, fresh.codes)
        assert (grown.doc_ids, grown.rows_version, same) == (list(fresh.doc_ids), fresh.rows_version, report)
        versions.append(grown)
    for version in versions:
        require_same(version)


def test_an_insertion_copies_no_row(corpus: list[Document], embeddings: np.ndarray) -> None:
    table = DocidTable.build(fit_space(SMALL, corpus[:300], embeddings[:300], seed=0), corpus[:300], embeddings[:300])
    first, _ = table.insert(corpus[300:301], embeddings[300:301])
    before = Corpus.of(first)
    bits, edges, leaves = before.bitset.bits, before.trie.edges.runs[0], before.trie.leaves.runs[0]
    second, _ = first.insert(corpus[301:303], embeddings[301:303])
    after = Corpus.of(second)
    for name in ("codes", "live", "columns"):
        assert np.shares_memory(getattr(first, name), getattr(second, name)), name
    assert second._rows is first._rows
    assert "bitset" in vars(after)
    assert "trie" in vars(after)
    assert np.shares_memory(bits, after.bitset.bits)
    assert after.trie.edges.runs[0] is edges
    assert after.trie.leaves.runs[0] is leaves
    assert (len(first), len(second)) == (301, 303)
    assert first.codes.shape == (301, 3)


def test_two_that_grow_from_one_version_do_not_see_each_other() -> None:
    table, _ = random_table(40).insert(documents(["shared"]))
    require_same(table)
    left, _ = table.insert(documents(["left", "both"]))
    right, _ = table.insert(documents(["right", "other", "both"]))
    again, _ = left.insert(documents(["again"]))
    for version in (table, left, right, again):
        require_same(version)
    assert "right" not in left.rows
    assert "left" not in right.rows
    assert [version.rows["both"] for version in (left, right, again)] == [42, 43, 42]


def test_a_search_under_way_sees_one_version() -> None:
    """A reader of one version finds the same while hundreds of documents arrive behind it."""
    table, _ = random_table(50, levels=4, codes=32).insert(documents(["one"]))
    corpus, codes = Corpus.of(table), table.codes.astype(np.int64)

    def look() -> tuple[bytes, ...]:
        valid, nodes = corpus.bitset.of_codes(codes), corpus.trie.root(len(codes))
        for level in range(table.levels):
            nodes = corpus.trie.step(nodes, codes[:, level])
        buckets = np.concatenate([corpus.bucket(code) for code in codes])
        parts = (valid, corpus.bitset.allowed_all(valid), nodes, buckets, corpus.columns)
        return (*(part.tobytes() for part in parts), repr([*table.rows.items()]).encode())

    expected, done = look(), threading.Event()
    differing: list[bool] = []

    def read() -> None:
        while not done.is_set():
            differing.append(look() != expected)

    reader = threading.Thread(target=read)
    reader.start()
    grown = table
    for number in range(60):
        grown, _ = grown.insert(documents([f"{number}/{i}" for i in range(1 + number % 9)]))
    done.set()
    reader.join()
    assert differing
    assert not any(differing)
    require_same(grown)


def test_rows_of_deleted_documents_go_with_the_next_insertion() -> None:
    table, _ = random_table(30).insert(documents([f"second{i}" for i in range(5)]))
    less = table.delete(["first0", "second4"])
    require_same(less)
    assert len(less.rows) == 33
    grown, _ = less.insert(documents(["first0"]))
    assert len(grown) == 34
    assert grown.rows["first0"] == 33
    for version in (table, less, grown):
        require_same(version)


@pytest.mark.parametrize("family", ["rq", "append", "hkmeans", "random", "text.title"])
def test_many_insertions_give_the_codes_that_each_gives_alone(
    family: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    collision = "append" if family == "append" else "bucket"
    config = DocidConfig(family="rq" if family == "append" else family, levels=4, codes=16)
    space = fit_space(config, corpus[:300], embeddings[:300], seed=0, tokenizer=words)
    table = DocidTable.build(space, corpus[:300], embeddings[:300], collision)
    versions = [table]
    for start in range(300, 480, 30):
        batch = slice(start, start + 30)
        fresh, report = alone(table).insert(corpus[batch], embeddings[batch])
        table, same = table.insert(corpus[batch], embeddings[batch])
        np.testing.assert_array_equal(table.codes, fresh.codes)
        assert same == report
        require_same(table)
        versions.append(table)
    for version in versions:
        require_same(version)


def test_a_grown_table_travels_without_what_it_shares() -> None:
    table, _ = random_table(10).insert(documents(["a"]))
    require_same(table)
    back = pickle.loads(pickle.dumps(table))
    require_same(back)
    assert back.insert(documents(["b"]))[0].doc_ids == [*table.doc_ids, "b"]


def test_runs_are_few_and_hold_every_entry() -> None:
    rng, runs = np.random.default_rng(0), SortedRuns()
    every: list[tuple[int, int]] = []
    for number in range(2000):
        keys = rng.integers(0, 500, 3)
        every.extend((int(key), number) for key in keys)
        runs = runs.extended(keys, np.full(3, number))
    assert len(runs.runs) <= 6
    owner, keys, values = runs.between(np.arange(500), np.arange(500) + 1)
    assert (owner == keys).all()
    found = [(int(key), int(value)) for key, value in zip(keys, values, strict=True)]
    assert sorted(found) == sorted(every)
    assert all(values[owner == key].tolist() == [value for k, value in every if k == key] for key in range(0, 500, 50))
    first = dict(reversed(every))
    assert runs.first(np.arange(501)).tolist() == [first.get(key, -1) for key in range(501)]
