from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from mobula import config as configs
from mobula.data.records import Document
from mobula.errors import ConfigError, MobulaError
from mobula.models.text import StaticEmbedding
from mobula.retrieval.docids import hierarchy, quantised, text
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.families import FAMILIES, NUMERIC, QUANTISED, TEXT
from mobula.retrieval.docids.quantised import CodebookCollapsed, entropies
from mobula.retrieval.docids.settings import HkConfig, RqConfig
from mobula.retrieval.docids.space import DocidSpace, fit_space
from mobula.retrieval.search import Unsupported

SMALL = DocidConfig(levels=4, codes=16, iterations=5, hk=HkConfig(branch=4, leaf=20))


def fit(
    family: str, documents: list[Document], embeddings: np.ndarray, words: StaticEmbedding, config: DocidConfig = SMALL
) -> DocidSpace:
    return fit_space(replace(config, family=family), documents, embeddings, seed=3, encoder_hash="e", tokenizer=words)


@pytest.mark.parametrize("family", FAMILIES)
def test_reencode_reproduces_rows(
    family: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    space = fit(family, corpus, embeddings, words)
    codes = space.encode(corpus, embeddings)
    assert codes.dtype == np.int32
    assert codes.shape == (len(corpus), space.levels)
    assert (codes >= 0).all()
    assert (codes < space.sizes).all()
    np.testing.assert_array_equal(space.encode(corpus, embeddings), codes)
    backwards = space.encode(corpus[::-1], embeddings[::-1])
    np.testing.assert_array_equal(backwards[::-1], codes)
    if family not in ("hkmeans", "random"):  # which hand out leaf indices and unused rows
        alone = [space.encode([d], e[None])[0] for d, e in zip(corpus[:40], embeddings[:40], strict=True)]
        np.testing.assert_array_equal(alone, codes[:40])


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"random", "atomic"}))
def test_fit_on_train_only(
    family: str,
    corpus: list[Document],
    embeddings: np.ndarray,
    newcomers: tuple[list[Document], np.ndarray],
    words: StaticEmbedding,
) -> None:
    space = fit(family, corpus, embeddings, words)
    before = space.hash
    space.encode(*newcomers)
    assert fit(family, corpus, embeddings, words).hash == before

    changed = [Document(corpus[0].id, newcomers[0][0].title, newcomers[0][0].text), *corpus[1:]]
    moved = np.concatenate([newcomers[1][:1], embeddings[1:]])
    assert fit(family, changed, moved, words).hash != before


def test_every_ingredient_of_a_space_is_in_its_hash(
    corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    space = fit("rq", corpus, embeddings, words)
    book = space.arrays["codebook"].copy()
    book[-1, -1, -1] += 1e-6
    others = [
        replace(space, family="pq"),
        replace(space, sizes=space.sizes + 1),
        replace(space, arrays={**space.arrays, "codebook": book}),
        replace(space, arrays={**space.arrays, "mean": space.arrays["mean"] * 0.5}),
        replace(space, meta={"encoder_hash": "another"}),
    ]
    assert len({space.hash, *(other.hash for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("codes", [16, 32])
def test_balanced_fit_uses_codes_evenly_where_plain_degenerates(
    codes: int, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    config = DocidConfig(levels=8, codes=codes, min_entropy=0.0)
    least, error = {}, {}
    for assign in ("plain", "normalised", "balanced"):
        space = fit("rq", corpus, embeddings, words, replace(config, rq=RqConfig(assign=assign)))
        rows = space.encode(corpus, embeddings)
        least[assign] = entropies(rows, space.sizes).min() / np.log2(codes)
        error[assign] = ((space.centred(embeddings) - space.reconstruct(rows)) ** 2).sum(1).mean()
    assert least["plain"] < 0.6
    assert least["normalised"] > 0.85
    assert least["balanced"] > 0.95
    assert error["balanced"] < error["plain"]


def test_entropy_guard(corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding) -> None:
    """A collapsed level raises, unless there are too few documents per code to tell."""
    plain = DocidConfig(levels=8, codes=32, rq=RqConfig(assign="plain"))
    with pytest.raises(CodebookCollapsed, match=r"docid level \d has .* bits, expected at least 3.00 of 5.00"):
        fit("rq", corpus, embeddings, words, plain)
    few = 32 * 8 - 1
    fit("rq", corpus[:few], embeddings[:few], words, plain)
    fit("rq", corpus, embeddings, words, replace(plain, min_entropy=0.0))
    fit("rq", corpus, embeddings, words, replace(plain, rq=RqConfig()))


def test_rq_is_greedy_nearest_residual(corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding) -> None:
    space = fit("rq", corpus, embeddings, words)
    codes = space.encode(corpus[:20], embeddings[:20])
    for row, embedding in zip(codes, embeddings, strict=False):
        residual = embedding / np.linalg.norm(embedding) - space.arrays["mean"]
        for level, table in enumerate(space.arrays["codebook"]):
            assert row[level] == ((residual - table) ** 2).sum(1).argmin()
            residual = residual - table[row[level]]


@pytest.mark.parametrize("family", ["pq", "opq"])
def test_pq_takes_the_nearest_entry_of_every_rotated_slice(
    family: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    space = fit(family, corpus, embeddings, words)
    rotation, book = space.arrays["rotation"], space.arrays["codebook"]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(256), atol=1e-4)
    codes = space.encode(corpus[:20], embeddings[:20])
    slices = (space.centred(embeddings[:20]) @ rotation.T).reshape(20, 4, 64)
    distance = ((slices[:, :, None] - book) ** 2).sum(-1)
    np.testing.assert_array_equal(codes, distance.argmin(2))
    error = ((space.reconstruct(codes) - space.centred(embeddings[:20])) ** 2).sum(1)
    np.testing.assert_allclose(error, distance.min(2).sum(1), rtol=1e-4)


@pytest.mark.parametrize("family", ["rq", "pq", "opq", "hkmeans"])
def test_fitting_on_few_documents_warns_of_nothing(family: str, capfd: pytest.CaptureFixture[str]) -> None:
    """faiss writes to the process's own stderr, once a clustering: hundreds of lines of a demo."""
    points = np.random.default_rng(0).normal(size=(120, 16)).astype(np.float32)
    documents = [Document(str(i), "", "x") for i in range(len(points))]
    fit_space(DocidConfig(family=family, levels=4, codes=8), documents, points, seed=0)
    written = capfd.readouterr()
    assert "WARNING" not in written.err + written.out


def test_opq_reconstructs_better_than_a_random_rotation(
    corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    errors = {}
    for family in ("pq", "opq"):
        space = fit(family, corpus, embeddings, words)
        found = space.reconstruct(space.encode(corpus, embeddings))
        errors[family] = ((found - space.centred(embeddings)) ** 2).sum(1).mean()
    assert errors["opq"] < errors["pq"]


@pytest.mark.parametrize("family", QUANTISED)
def test_codewords_add_up_to_the_reconstruction(
    family: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    space = fit(family, corpus, embeddings, words)
    codes = space.encode(corpus[:30], embeddings[:30])
    words_lkd = space.codewords()
    assert words_lkd is not None
    total = sum(words_lkd[level][codes[:, level]] for level in range(space.levels))
    np.testing.assert_allclose(total, space.reconstruct(codes), atol=1e-5)


def balance_at_once(points: np.ndarray, centroids: np.ndarray, rounds: int, temperature: float) -> np.ndarray:
    """Centroids of balanced assignments from whole matrices."""
    for _ in range(rounds):
        cost = np.maximum((points**2).sum(1, keepdims=True) + quantised.distances(points, centroids), 0.0)
        plan = quantised.sinkhorn(cost, temperature * cost.mean())
        centroids = quantised._means(points, plan.argmax(1), centroids)
    return centroids


def test_balanced_codebooks_do_not_depend_on_chunks(embeddings: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.asarray(embeddings, np.float64)
    centroids = quantised.kmeans(points, 16, 5, 0)
    expected = balance_at_once(points, centroids, 10, 0.05)
    monkeypatch.setattr(quantised, "CHUNK", 64)
    found = quantised._balance(points, centroids, 10, 0.05)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(quantised.nearest(points, found), quantised.nearest(points, expected))


def test_balancing_holds_one_matrix_of_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "CHUNK", 200)
    points = np.random.default_rng(0).standard_normal((8000, 8))
    centroids = points[:64].astype(np.float32)
    tracemalloc.start()
    quantised._balance(points, centroids, 2, 0.05)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * 8 * len(points) * len(centroids)


def test_sinkhorn_meets_both_marginals() -> None:
    cost = np.random.default_rng(0).random((200, 10)) ** 3
    plan = quantised.sinkhorn(cost, 0.05 * cost.mean())
    np.testing.assert_allclose(plan.sum(1), 1.0)
    np.testing.assert_allclose(plan.sum(0), 20.0, rtol=0.05)


@pytest.mark.parametrize("family", NUMERIC)
def test_codes_carry_meaning(
    family: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    """Documents that share their first code are closer to each other than documents at large."""
    space = fit(family, corpus, embeddings, words)
    first = space.encode(corpus, embeddings)[:, 0]
    points = space.centred(embeddings)
    within = sum(((points[first == k] - points[first == k].mean(0)) ** 2).sum() for k in np.unique(first))
    assert within < 0.9 * (points**2).sum()


def test_windows_change_what_codebooks_are_fitted_on(
    corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    config = replace(SMALL, fit_on="windows")
    windows = words.embed([" ".join(d.text.split()[:12]) for d in corpus])
    space = fit_space(config, corpus, embeddings, seed=3, encoder_hash="e", windows=windows)
    plain = fit("rq", corpus, embeddings, words)
    assert space.hash != plain.hash
    np.testing.assert_array_equal(space.arrays["mean"], plain.arrays["mean"])
    with pytest.raises(MobulaError, match="fit_on=windows"):
        fit("rq", corpus, embeddings, words, config)
    with pytest.raises(MobulaError, match="fit_on=documents"):
        fit_space(SMALL, corpus, embeddings, seed=3, windows=windows)


def test_random_rows_are_unique_uniform_and_seeded(corpus: list[Document]) -> None:
    documents = [Document(f"{d.id}.{copy}", "", "") for d in corpus for copy in range(4)]
    config = DocidConfig(family="random", levels=4, codes=16)
    spaces = [fit_space(config, documents, None, seed=seed) for seed in (0, 1)]
    codes = spaces[0].encode(documents, None)
    assert len(np.unique(codes, axis=0)) == len(documents)
    assert entropies(codes, spaces[0].sizes).min() > 0.98 * np.log2(16)
    assert (spaces[1].encode(documents, None) != codes).any()
    with pytest.raises(ConfigError, match=r"2\^4 random codes are too few"):
        fit_space(replace(config, codes=2), documents, None, seed=0)


def test_atomic_docids_cannot_be_added(corpus: list[Document]) -> None:
    space = fit_space(DocidConfig(family="atomic"), corpus, None, seed=0)
    assert space.sizes.tolist() == [len(corpus)]
    assert space.encode(corpus, None)[:, 0].tolist() == list(range(len(corpus)))
    with pytest.raises(Unsupported, match="'later'"):
        space.encode([Document("later", "", "text")], None)


def test_hkmeans_paths_lead_to_leaves(
    corpus: list[Document],
    embeddings: np.ndarray,
    newcomers: tuple[list[Document], np.ndarray],
    words: StaticEmbedding,
) -> None:
    config = replace(SMALL, levels=8)
    space = fit("hkmeans", corpus, embeddings, words, config)
    codes = space.encode(corpus, embeddings)
    assert len(np.unique(codes, axis=0)) == len(corpus)
    paths: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for document, row in zip(corpus, codes.tolist(), strict=True):
        path = [c for c in row if 1 <= c <= 4]
        leaf, *rest = row[len(path) :]
        assert row[: len(path)] == path
        assert leaf > 4
        assert rest
        assert set(rest) == {hierarchy.END}
        paths.setdefault(tuple(path), []).append((document.id, leaf - 5))
    assert len({len(path) for path in paths}) > 1
    for path, members in paths.items():
        assert len(members) <= 20 or len(path) == 8 - 2  # no room left to split
        assert [index for _, index in sorted(members)] == list(range(len(members)))

    later = space.encode(*newcomers, taken=codes)
    rows, counts = np.unique(np.concatenate([codes, later]), axis=0, return_counts=True)
    assert (rows[counts > 1].max(1) == 4 + 2 * 20).all()  # only the last index of a full leaf is shared
    assert counts.sum() == len(codes) + len(later)
    assert (counts > 1).sum() < 5


def test_hkmeans_documents_beyond_a_full_leaf_share_its_last_index(words: StaticEmbedding) -> None:
    random = np.random.default_rng(0)
    config = DocidConfig(family="hkmeans", levels=3, hk=HkConfig(branch=2, leaf=3))
    documents = [Document(f"{i:03}", "", "") for i in range(40)]
    embeddings = random.standard_normal((40, 8)).astype(np.float32)
    codes = fit_space(config, documents, embeddings, seed=0).encode(documents, embeddings)
    # Three levels leave room for one branch, so both leaves hold more than their six indices.
    assert set(codes[:, 0].tolist()) == {1, 2}
    assert codes[:, 1].min() == 3
    assert codes[:, 1].max() == 8
    assert (codes[:, 1] == 8).sum() == 40 - 2 * 5


def test_title_docids_are_padded_and_fall_back_to_the_body(words: StaticEmbedding) -> None:
    documents = [Document("a", "Two words", "The body."), Document("b", " ", "Body without a title here")]
    space = fit("text.title", documents, np.zeros((2, 256)), words)
    codes = space.encode(documents, None)
    tokens = text.tokens(space.arrays["vocabulary"], codes)
    assert tokens[0] == words.encode(["Two words"])[0][:4]
    assert tokens[1] == words.encode(["Body without a title here"])[0][:4]
    assert codes[0, len(tokens[0]) :].tolist() == [space.eos] * (4 - len(tokens[0]))


def test_the_vocabulary_is_what_occurs_in_docids(
    corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    for family in TEXT:
        space = fit(family, corpus, embeddings, words)
        codes = space.encode(corpus, embeddings)
        assert np.unique(codes[codes != space.eos]).tolist() == list(range(1, int(space.sizes[0])))
        assert len(space.arrays["vocabulary"]) == space.sizes[0]


def test_keywords_are_the_highest_tf_idf_rarest_first(
    corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    space = fit("text.keywords", corpus, embeddings, words)
    tokens = words.encode([f"{d.title} {d.text}" for d in corpus])
    sets = [set(row) for row in tokens]
    idf = {t: np.log(len(corpus) / sum(t in row for row in sets)) for t in sets[7]}
    weight = {t: tokens[7].count(t) * idf[t] for t in idf}
    (chosen,) = text.tokens(space.arrays["vocabulary"], space.encode(corpus[7:8], None))
    assert len(set(chosen)) == 4
    assert min(weight[t] for t in chosen) >= sorted(weight.values())[-4] - 1e-5
    assert [idf[t] for t in chosen] == sorted((idf[t] for t in chosen), reverse=True)


def test_tokens_that_the_fit_has_not_seen_come_behind_the_others(words: StaticEmbedding) -> None:
    space = fit("text.title", [Document("a", "alpha beta gamma", "")], np.zeros((1, 256)), words)
    documents = [Document("b", "zebra gamma", ""), Document("c", "", "")]
    codes, brought = space.kind.insert(space, documents, None, None, np.zeros(0, np.int64))
    vocabulary = np.append(space.arrays["vocabulary"], brought)
    assert text.tokens(vocabulary, codes)[0] == words.encode(["zebra gamma"])[0][:4]
    assert vocabulary[: space.sizes[0]].tolist() == space.arrays["vocabulary"].tolist()
    assert len(vocabulary) > space.sizes[0]
    assert codes[1].tolist() == [space.eos] * 4


def test_a_keyword_of_no_document_of_the_fit_counts_as_the_rarest(words: StaticEmbedding) -> None:
    first = [Document(str(i), "", f"common {word}") for i, word in enumerate(("one", "two", "three"))]
    space = fit("text.keywords", first, np.zeros((3, 256)), words, replace(SMALL, levels=1))
    later = [Document("b", "", "common one zebra")]
    codes, brought = space.kind.insert(space, later, None, None, np.zeros(0, np.int64))
    vocabulary = np.append(space.arrays["vocabulary"], brought)
    # log 4 for what no document had, log 3 for what one of three had, 0 for what all had.
    assert words.decode(text.tokens(vocabulary, codes)[0]).strip() in words.decode(words.encode(["zebra"])[0])
    assert space.arrays["idf_documents"].item() == 3


@pytest.mark.parametrize("family", [*TEXT, "random", "atomic"])
def test_families_without_a_quantiser_say_so(
    family: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    space = fit(family, corpus, embeddings, words)
    with pytest.raises(Unsupported, match="has no quantiser"):
        space.encode_queries(embeddings)
    with pytest.raises(Unsupported, match="has no quantiser"):
        space.reconstruct(space.encode(corpus, embeddings))
    assert space.codewords() is None


def test_wrong_inputs_are_named(corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding) -> None:
    with pytest.raises(ConfigError, match="codes=16 but only 10 vectors"):
        fit("rq", corpus[:10], embeddings[:10], words)
    with pytest.raises(ConfigError, match="levels=3 does not divide the embedding size 256"):
        fit("pq", corpus, embeddings, words, replace(SMALL, levels=3))
    with pytest.raises(ConfigError, match="no documents"):
        fit("rq", [], embeddings[:0], words)
    space = fit("rq", corpus, embeddings, words)
    with pytest.raises(MobulaError, match=r"expected \[N, 256\]"):
        space.encode(corpus, embeddings[:, :100])
    with pytest.raises(MobulaError, match="one each"):
        space.encode(corpus, embeddings[:3])
    with pytest.raises(MobulaError, match="needs the documents' embeddings"):
        space.encode(corpus, None)
    with pytest.raises(MobulaError, match="needs a tokenizer"):
        fit_space(replace(SMALL, family="text.lead"), corpus, None, seed=0)


def test_config_refuses_what_would_be_ignored() -> None:
    with pytest.raises(ConfigError, match="hkmeans needs 3"):
        configs.build(DocidConfig, {"family": "hkmeans", "levels": 2})
    with pytest.raises(ConfigError, match="fit_on=windows has no meaning"):
        configs.build(DocidConfig, {"family": "random", "fit_on": "windows"})
    with pytest.raises(ConfigError, match="balanced"):
        configs.build(DocidConfig, {"rq": {"assign": "balance"}})
