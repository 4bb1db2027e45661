from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobula.retrieval.docids.bitset import Bitset
from mobula.retrieval.docids.table import DocidTable
from tests.retrieval.docids.tables import table_of, tables


def agreeing(table: DocidTable, partial: np.ndarray) -> np.ndarray:
    """Live rows that have the filled positions of a partial code; written out, for comparison."""
    rows = [
        row
        for row in range(len(table))
        if table.live[row] and all(c in (-1, table.codes[row, level]) for level, c in enumerate(partial))
    ]
    return np.array(rows, np.int64)


def allowed(table: DocidTable, rows: np.ndarray) -> np.ndarray:
    out = np.zeros((table.levels, table.width), bool)
    for row in rows:
        for level in range(table.levels):
            out[level, table.codes[row, level]] = True
    return out


@settings(max_examples=80, deadline=None)
@given(table=tables(), seed=st.integers(0, 2**32))
def test_bitset_matches_bruteforce(table: DocidTable, seed: int) -> None:
    random = np.random.default_rng(seed)
    bitset = Bitset.build(table)
    picks = table.codes[random.choice(np.flatnonzero(table.live), 5)]
    partial = np.where(random.random(picks.shape) < 0.5, picks, -1)
    valid = bitset.all_valid(5)
    for level in range(table.levels):
        filled = np.flatnonzero(partial[:, level] >= 0)
        valid[filled] = bitset.commit(valid[filled], level, partial[filled, level])
    rows = [agreeing(table, p) for p in partial]
    expected = np.stack([allowed(table, r) for r in rows])

    np.testing.assert_array_equal(bitset.of_codes(partial), valid)
    np.testing.assert_array_equal(bitset.count(valid), [len(r) for r in rows])
    for found, wanted in zip(bitset.documents(valid), rows, strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(bitset.allowed_all(valid), expected)
    for level in range(table.levels):
        np.testing.assert_array_equal(bitset.allowed(valid, level), expected[:, level])
    levels = random.integers(0, table.levels, 5)
    np.testing.assert_array_equal(bitset.allowed(valid, levels), expected[np.arange(5), levels])


@settings(max_examples=80, deadline=None)
@given(table=tables(), seed=st.integers(0, 2**32))
def test_listing_documents_and_scanning_bits_agree(table: DocidTable, seed: int) -> None:
    bitset = Bitset.build(table)
    keep = np.random.default_rng(seed).integers(0, 2**63, (4, bitset.words), dtype=np.uint64)
    valid = bitset.all_valid(4) & keep
    by_rows = bitset._all_by_rows(valid)
    by_bits = np.stack([bitset._by_bits(row, slice(None)) for row in valid])
    np.testing.assert_array_equal(by_rows, by_bits)
    for level in range(table.levels):
        one = bitset._by_rows(valid, np.full(4, level))
        np.testing.assert_array_equal(one, by_bits[:, level])


@settings(max_examples=60, deadline=None)
@given(table=tables(), seed=st.integers(0, 2**32))
def test_committing_allowed_codes_in_any_order_ends_at_a_live_document(table: DocidTable, seed: int) -> None:
    random = np.random.default_rng(seed)
    bitset = Bitset.build(table)
    valid, code = bitset.all_valid(1), np.full(table.levels, -1)
    for level in random.permutation(table.levels):
        code[level] = random.choice(np.flatnonzero(bitset.allowed(valid, int(level))[0]))
        valid = bitset.commit(valid, int(level), code[level : level + 1])
        assert bitset.count(valid)[0] > 0
    (rows,) = bitset.documents(valid)
    assert table.live[rows].all()
    assert (table.codes[rows] == code).all()


def test_requests_do_not_influence_each_other() -> None:
    random = np.random.default_rng(0)
    table = table_of(random.integers(0, 16, (3000, 4)), [16] * 4)
    bitset = Bitset.build(table)
    valid = bitset.all_valid(3)
    # One request with every document, one with many, one with few: each goes another way.
    valid[1, :2] = 0
    valid[2] = bitset.commit(valid[2:], 0, np.array([3]))[0]
    together = bitset.allowed_all(valid)
    for b in range(3):
        np.testing.assert_array_equal(together[b], bitset.allowed_all(valid[b : b + 1])[0])
        np.testing.assert_array_equal(together[b, 2], bitset.allowed(valid[b : b + 1], 2)[0])


def test_an_empty_set_allows_nothing() -> None:
    bitset = Bitset.build(table_of(np.array([[0, 1], [1, 1]]), [2, 2]))
    nothing = bitset.commit(bitset.commit(bitset.all_valid(1), 0, np.array([0])), 1, np.array([0]))
    assert bitset.count(nothing)[0] == 0
    assert not bitset.allowed_all(nothing).any()
    assert len(bitset.documents(nothing)[0]) == 0


@pytest.mark.parametrize("documents", [1, 63, 64, 65, 128])
def test_word_boundaries(documents: int) -> None:
    table = table_of(np.arange(documents)[:, None], [documents])
    bitset = Bitset.build(table)
    assert bitset.words == (documents + 63) // 64
    for row in (0, documents - 1):
        (found,) = bitset.documents(bitset.commit(bitset.all_valid(1), 0, np.array([row])))
        assert found.tolist() == [row]
