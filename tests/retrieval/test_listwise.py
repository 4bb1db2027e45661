"""Which docids are ranked in training: all, or some of a large corpus, and never a right one as a rival."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mobula.retrieval.listwise import RankedDocids

CODES = torch.tensor([[0, 0], [0, 1], [0, 1], [1, 0], [1, 1], [2, 0]])  # documents 1 and 2 share a docid
# Query 0 is of documents 0 and 3, query 1 of document 1, query 2 of document 5.
EXAMPLES = np.array([[0, 0], [0, 3], [1, 1], [2, 5]])


@pytest.fixture
def ranked() -> RankedDocids:
    return RankedDocids.of(CODES, EXAMPLES)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_docid_is_ranked_once_and_the_right_one_is_found(ranked: RankedDocids) -> None:
    found = ranked.all(EXAMPLES, 100, rng())
    assert len(found["docids"]) == 5
    assert torch.equal(found["docids"][found["target"]], CODES[EXAMPLES[:, 1]])
    also = [found["docids"][row].tolist() for row in found["others"]]
    assert also == [[[1, 0]], [[0, 0]], [], []]


def test_of_a_large_corpus_some_are_drawn_and_the_right_ones_always(ranked: RankedDocids) -> None:
    for seed in range(20):
        found = ranked.all(EXAMPLES[2:], 2, rng(seed))
        assert 2 <= len(found["docids"]) <= 4
        assert torch.equal(found["docids"][found["target"]], CODES[EXAMPLES[2:, 1]])
        assert not found["others"].any()


def test_the_twin_ranks_its_own_docid_and_others_half_of_which_begin_alike(ranked: RankedDocids) -> None:
    found = ranked.drawn(np.repeat(EXAMPLES, 50, 0), 6, rng())
    codes = CODES[np.repeat(EXAMPLES[:, 1], 50)]
    assert found["docids"].shape == (200, 7, 2)
    assert torch.equal(found["docids"][:, 0], codes) and not found["target"].any()
    close = found["docids"][:, 1:4]
    assert (close[..., 0] == codes[:, :1]).all()
    assert len(close[:50].flatten(0, 1).unique(dim=0)) == 2  # (0, 0) and (0, 1)
    assert not found["others"][:, 0].any()
    # The same docid drawn again, and the other right one, are no rivals.
    drawn = found["docids"][:50, 1:]
    right = (drawn == torch.tensor([0, 0])).all(-1) | (drawn == torch.tensor([1, 0])).all(-1)
    assert torch.equal(found["others"][:50, 1:], right)
