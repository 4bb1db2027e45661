from __future__ import annotations

import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.docids.trie import OUTSIDE, Trie
from tests.retrieval.docids.tables import table_of, tables


def dict_trie(table: DocidTable) -> dict[tuple[int, ...], set[int]]:
    children: dict[tuple[int, ...], set[int]] = {}
    for row in np.flatnonzero(table.live):
        code = tuple(table.codes[row].tolist())
        for level in range(table.levels):
            children.setdefault(code[:level], set()).add(code[level])
    return children


@settings(max_examples=80, deadline=None)
@given(table=tables(), seed=st.integers(0, 2**32))
def test_trie_masks_vectorised(table: DocidTable, seed: int) -> None:
    """Masks and steps equal a trie of dictionaries, for prefixes inside and outside."""
    random = np.random.default_rng(seed)
    trie, children = Trie.build(table), dict_trie(table)
    nodes = trie.root(3, 4)
    prefixes = [[() for _ in range(4)] for _ in range(3)]
    for level in range(table.levels + 1):
        mask = trie.mask(nodes)
        for i, j in np.ndindex(3, 4):
            assert set(np.flatnonzero(mask[i, j]).tolist()) == children.get(prefixes[i][j], set())
        if level == table.levels:
            break
        codes = random.integers(0, table.width, (3, 4))
        # Mostly follow the trie, or nearly all prefixes would leave it at once.
        for i, j in np.ndindex(3, 4):
            if mask[i, j].any() and random.random() < 0.8:
                codes[i, j] = random.choice(np.flatnonzero(mask[i, j]))
            prefixes[i][j] = (*prefixes[i][j], int(codes[i, j]))
        nodes = trie.step(nodes, codes)
    for i, j in np.ndindex(3, 4):
        same = (table.codes == np.array(prefixes[i][j])).all(1) & table.live
        found = trie.documents(int(nodes[i, j])) if nodes[i, j] != OUTSIDE else np.zeros(0, np.int64)
        np.testing.assert_array_equal(found, np.flatnonzero(same))


def test_a_step_makes_the_same_python_calls_however_many_beams() -> None:
    table = table_of(np.random.default_rng(0).integers(0, 8, (500, 4)), [8] * 4)
    trie = Trie.build(table)

    def calls(beams: int) -> int:
        nodes, codes = trie.root(beams), np.zeros(beams, np.int64)
        count = 0

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        trie.mask(trie.step(nodes, codes))
        sys.setprofile(None)
        return count

    assert calls(1) == calls(10_000)


def test_codes_outside_the_alphabet_leave_the_trie() -> None:
    trie = Trie.build(table_of(np.array([[0, 1], [1, 0]]), [2, 2]))
    assert trie.step(trie.root(3), np.array([-1, 2, 1])).tolist()[:2] == [OUTSIDE, OUTSIDE]
    assert trie.step(np.array([OUTSIDE]), np.array([0])).tolist() == [OUTSIDE]
    assert not trie.mask(np.array([OUTSIDE])).any()


def test_nodes_are_numbered_level_by_level() -> None:
    table = table_of(np.array([[0, 1], [0, 1], [0, 0], [2, 1]]), [3, 2])
    trie = Trie.build(table)
    edges = [(0, 0), (0, 2), (1, 0), (1, 1), (2, 1)]
    assert trie.nodes == 6
    ((edge_keys, children),), ((leaf_keys, rows),) = trie.edges.runs, trie.leaves.runs
    assert edge_keys.tolist() == [(node << 32) + code for node, code in edges]
    assert children.tolist() == [1, 2, 3, 4, 5]
    assert (leaf_keys.tolist(), rows.tolist()) == ([3, 4, 4, 5], [2, 0, 1, 3])
    assert trie.nbytes == 8 * 2 * (5 + 4)
    assert trie.documents(4).tolist() == [0, 1]
    assert trie.documents(1).tolist() == []


def test_a_corpus_without_live_documents_has_an_empty_trie() -> None:
    trie = Trie.build(table_of(np.array([[0, 1]]), [2, 2], np.array([False])))
    assert not trie.mask(trie.root(2)).any()
    assert trie.step(trie.root(2), np.array([0, 1])).tolist() == [OUTSIDE, OUTSIDE]
