from __future__ import annotations

import numpy as np
import pytest

from mobula.data.records import Document, Query, RetrievalData
from mobula.errors import MobulaError, ModelError
from mobula.models.text import load_static
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.space import DocidSpace, fit_space
from mobula.retrieval.dynamic.chunks import ChunksConfig, Expansion, chunk_data, chunk_documents, cut, owner


def _encoder():
    try:
        return load_static("wordllama")
    except ModelError as error:
        pytest.skip(str(error))


def test_cut() -> None:
    assert cut(range(10), 64, 8) == [(0, 10)]
    assert cut([], 64, 8) == [(0, 0)]
    assert cut(range(130), 64, 8) == [(0, 64), (64, 128)]  # 2 tokens are too few for a chunk
    assert cut(range(144), 64, 8) == [(0, 64), (64, 128), (128, 144)]
    spaced = cut(range(64 * 9), 64, 3)
    assert spaced == [(0, 64), (256, 320), (512, 576)]  # evenly spaced, first and last kept


def test_every_document_has_a_chunk_and_chunks_know_their_document() -> None:
    documents = [Document("a", "", "words " * 200), Document("b", "title", ""), Document("c:1", "", "short")]
    chunks = chunk_documents(documents, _encoder(), ChunksConfig(size=64, per_document=2))
    assert [owner(chunk.id) for chunk in chunks] == ["a", "a", "b", "c:1"]
    assert all(chunk.text for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == len(chunks)


def test_training_queries_ask_for_the_nearest_chunk_and_dev_queries_for_any() -> None:
    encoder = _encoder()
    text = "the stock market fell sharply as investors sold shares " * 6 + "my cat sleeps on the warm sofa all day " * 8
    data = RetrievalData(
        "toy",
        "here",
        "",
        [Document("d", "", text)],
        {"train": [Query("q", "a cat on a sofa", ("d",))], "dev": [Query("r", "investors", ("d",))]},
    )
    config = ChunksConfig(size=48, per_document=8)
    found = chunk_data(data, encoder, encoder, config)
    (asked,) = found.queries["train"][0].gold
    texts = {chunk.id: chunk.text for chunk in found.documents}
    assert "cat" in texts[asked]
    assert set(found.queries["dev"][0].gold) == set(texts)
    every = chunk_data(data, encoder, encoder, ChunksConfig(size=48, query_target="all"))
    assert set(every.queries["train"][0].gold) == set(texts)


@pytest.fixture(scope="module", params=["rq", "pq"])
def space(request) -> DocidSpace:
    points = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    documents = [Document(str(i), "", "") for i in range(60)]
    config = DocidConfig(family=request.param, levels=4, codes=4, min_entropy=0.0)
    return fit_space(config, documents, points, seed=0)


def _new(count: int = 25) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(count, 8)).astype(np.float32)


def _known(space: DocidSpace) -> np.ndarray:
    return space.encode_queries(np.random.default_rng(3).normal(size=(12, 8)).astype(np.float32))


def test_existing_leaf_takes_the_nearest_known_code(space: DocidSpace) -> None:
    known, vectors = _known(space), _new()
    codes = Expansion.parse("existing_leaf", 4).encode(space, known, vectors)
    assert {tuple(row) for row in codes.tolist()} <= {tuple(row) for row in known.tolist()}
    distinct = np.unique(known, axis=0)
    reconstructed = space.reconstruct(distinct).astype(np.float64)
    for vector, code in zip(space.centred(vectors), codes, strict=True):
        distances = ((reconstructed - vector) ** 2).sum(1)
        assert distances[(distinct == code).all(1)][0] == pytest.approx(distances.min(), abs=1e-6)


def test_free_is_the_quantiser_and_a_whole_prefix_is_a_leaf(space: DocidSpace) -> None:
    known, vectors = _known(space), _new()
    free = Expansion.parse("free", 4).encode(space, known, vectors)
    np.testing.assert_array_equal(free, space.encode_queries(vectors))
    whole = Expansion.parse("existing_prefix:4", 4).encode(space, known, vectors)
    np.testing.assert_array_equal(whole, Expansion.parse("existing_leaf", 4).encode(space, known, vectors))


def test_a_prefix_is_known_and_the_rest_is_free(space: DocidSpace) -> None:
    known, vectors = _known(space)[:2], _new()
    codes = Expansion.parse("existing_prefix:2", 4).encode(space, known, vectors)
    assert {tuple(row) for row in codes[:, :2].tolist()} <= {tuple(row) for row in known[:, :2].tolist()}
    leaf = Expansion.parse("existing_leaf", 4).encode(space, known, vectors)
    assert (codes[:, 2:] != leaf[:, 2:]).any()


@pytest.mark.parametrize("rule", ["existing", "existing_prefix", "existing_prefix:0", "existing_prefix:5", "free:2"])
def test_unknown_rules_are_refused(rule: str) -> None:
    with pytest.raises(MobulaError, match="expand="):
        Expansion.parse(rule, 4)
