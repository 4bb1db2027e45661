"""Docid tables with given codes, for tests of what stands on them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from mobula.retrieval.docids.space import DocidSpace
from mobula.retrieval.docids.table import DocidTable


def table_of(codes: np.ndarray, sizes: list[int], live: np.ndarray | None = None) -> DocidTable:
    sizes_l = np.array(sizes, np.int32)
    space = DocidSpace("random", sizes_l, {}, {"seed": 0})
    ids = [f"d{i}" for i in range(len(codes))]
    return DocidTable(space, codes.astype(np.int32), ids, np.ones(len(codes), bool) if live is None else live, sizes_l)


@st.composite
def tables(draw: st.DrawFn) -> DocidTable:
    """Random tables with collisions, unequal sizes per level and deleted rows."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    documents = draw(st.integers(1, 150))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = random.integers(0, sizes, (documents, len(sizes)))
    live = random.random(documents) < draw(st.sampled_from([1.0, 0.7, 0.1]))
    live[random.integers(documents)] = True
    return table_of(codes, sizes, live)
