from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mobula.data.records import Document
from mobula.errors import ArtifactError, ConfigError, DataError
from mobula.models.text import StaticEmbedding
from mobula.retrieval.docids.bitset import Bitset
from mobula.retrieval.docids.config import COLLISIONS, DocidConfig, code_length
from mobula.retrieval.docids.families import FAMILIES, Family
from mobula.retrieval.docids.settings import HkConfig
from mobula.retrieval.docids.space import DocidSpace, fit_space
from mobula.retrieval.docids.table import ARRAYS, FACTS, DocidSpaceMismatch, DocidTable
from mobula.retrieval.docids.text import tokens
from mobula.retrieval.docids.trie import Trie
from mobula.retrieval.search import Unsupported

COARSE = DocidConfig(levels=2, codes=8)  # many collisions


@pytest.fixture(scope="module")
def coarse(corpus: list[Document], embeddings: np.ndarray) -> DocidSpace:
    return fit_space(COARSE, corpus, embeddings, seed=0, encoder_hash="e")


def test_bucket_shares_codes_and_append_separates_them(
    coarse: DocidSpace, corpus: list[Document], embeddings: np.ndarray
) -> None:
    shared = DocidTable.build(coarse, corpus, embeddings)
    apart = DocidTable.build(coarse, corpus, embeddings, "append")
    counts = Counter(map(tuple, shared.codes.tolist()))
    facts = shared.report()
    assert facts["largest_bucket"] == max(counts.values()) > 1
    assert facts["distinct_codes"] == len(counts)
    assert facts["collision_rate"] == sum(n for n in counts.values() if n > 1) / len(corpus)
    assert facts["used_codes"] == [len({code[level] for code in counts}) for level in range(2)]

    assert (apart.levels, apart.width) == (3, max(8, max(counts.values())))
    assert apart.sizes.tolist() == [8, 8, max(counts.values())]
    assert apart.report()["collision_rate"] == 0
    np.testing.assert_array_equal(apart.codes[:, :2], shared.codes)
    for code in counts:
        rows = np.flatnonzero((shared.codes == code).all(1))
        by_id = sorted(rows, key=lambda row: corpus[row].id)
        assert apart.codes[by_id, 2].tolist() == list(range(len(rows)))
    assert apart.hash != shared.hash


@pytest.mark.parametrize("collision", COLLISIONS)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_the_code_length_is_known_before_any_corpus(
    family: Family, collision: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    """Which systems a run evaluates is decided from its configuration alone."""
    config = DocidConfig(family=family.name, levels=4, codes=16, collision=collision)
    space = fit_space(config, corpus, embeddings, seed=0, tokenizer=words)
    table = DocidTable.build(space, corpus, embeddings, family.collision(collision))
    assert table.levels == code_length(config, family.name)


@pytest.mark.parametrize("collision", ["bucket", "append"])
def test_insert_adds_rows_and_changes_none(
    collision: str,
    coarse: DocidSpace,
    corpus: list[Document],
    embeddings: np.ndarray,
    newcomers: tuple[list[Document], np.ndarray],
) -> None:
    table = DocidTable.build(coarse, corpus, embeddings, collision)
    grown, report = table.insert(*newcomers)
    assert (table.rows_version, grown.rows_version) == (0, 1)
    assert len(table) == len(corpus)
    assert report.documents == len(newcomers[0])
    assert grown.hash == table.hash
    np.testing.assert_array_equal(grown.codes[: len(table)], table.codes)
    np.testing.assert_array_equal(grown.codes[len(table) :, :2], coarse.encode(*newcomers))
    assert (grown.codes < grown.sizes).all()
    assert grown.doc_ids == table.doc_ids + [d.id for d in newcomers[0]]


def test_documents_beyond_a_full_bucket_share_its_last_index(
    coarse: DocidSpace, corpus: list[Document], embeddings: np.ndarray
) -> None:
    table = DocidTable.build(coarse, corpus, embeddings, "append")
    last = int(table.sizes[2]) - 1
    in_full_bucket = int(table.codes[:, 2].argmax())
    twins = [replace(corpus[in_full_bucket], id=f"twin.{i}") for i in range(3)]
    grown, report = table.insert(twins, np.repeat(embeddings[in_full_bucket, None], 3, axis=0))
    assert report.overflow == 3
    assert grown.codes[-3:, 2].tolist() == [last] * 3
    assert len(np.unique(grown.codes, axis=0)) == len(corpus)


def test_deleted_documents_are_gone_and_their_ids_free(
    coarse: DocidSpace, corpus: list[Document], embeddings: np.ndarray
) -> None:
    table = DocidTable.build(coarse, corpus, embeddings)
    gone = [d.id for d in corpus[:100]]
    less = table.delete(gone)
    assert less.rows_version == 1
    assert table.live.all()
    assert less.live.tolist() == [False] * 100 + [True] * (len(corpus) - 100)
    assert less.report()["documents"] == len(corpus) - 100
    assert not set(gone) & set(less.rows)
    bitset, trie = Bitset.build(less), Trie.build(less)
    assert bitset.count(bitset.all_valid(1))[0] == len(corpus) - 100
    leaf_rows = np.concatenate([rows for _, rows in trie.leaves.runs])
    assert len(leaf_rows) and leaf_rows.min() >= 100
    with pytest.raises(DataError, match="is not in the corpus"):
        less.delete(gone[:1])

    with pytest.raises(DataError, match="occurs twice"):
        table.delete([corpus[0].id, corpus[0].id])

    again, _ = less.insert(corpus[:1], embeddings[:1])
    assert again.doc_ids == [d.id for d in corpus[100:]] + [corpus[0].id]
    np.testing.assert_array_equal(again.codes[-1], table.codes[0])
    np.testing.assert_array_equal(again.codes[:-1], table.codes[100:])


@pytest.mark.parametrize("family", ["rq", "append", "hkmeans", "random", "text.title"])
def test_codes_of_deleted_documents_are_free_again(
    family: str, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    """Who leaves and comes back finds the code it had, and nobody else's changes, however often."""
    collision = "append" if family == "append" else "bucket"
    config = DocidConfig(family=COARSE.family if family == "append" else family, levels=4, codes=16)
    space = fit_space(config, corpus, embeddings, seed=0, tokenizer=words)
    table = DocidTable.build(space, corpus, embeddings, collision)
    codes = {d.id: code for d, code in zip(corpus, table.codes.tolist(), strict=True)}
    grown = table
    for start in (0, 200, 0, 400):
        leaving = slice(start, start + 200)
        less = grown.delete([d.id for d in corpus[leaving]])
        grown, report = less.insert(corpus[leaving], embeddings[leaving])
        assert {i: grown.codes[row].tolist() for i, row in grown.rows.items()} == codes
        assert report.overflow == 0
    assert len(grown) == len(corpus)


@pytest.mark.parametrize("collision", ["bucket", "append"])
def test_shared_codes_of_inserted_documents_are_counted(
    collision: str, coarse: DocidSpace, corpus: list[Document], embeddings: np.ndarray
) -> None:
    table = DocidTable.build(coarse, corpus[:50], embeddings[:50], collision)
    # More twins of one document than a bucket has places, so that some share a code with either policy.
    twins = [replace(corpus[0], id=f"twin.{i}") for i in range(int(table.width) + 1)]
    vectors = np.concatenate([embeddings[50:120], np.repeat(embeddings[:1], len(twins), axis=0)])
    grown, report = table.insert([*corpus[50:120], *twins], vectors)
    codes = list(map(tuple, grown.codes.tolist()))
    counts = Counter(codes)
    assert report.collisions == sum(counts[code] > 1 for code in codes[50:])
    repeated = sum(code in codes[: 50 + i] for i, code in enumerate(codes[50:]))
    assert report.overflow == (repeated if collision == "append" else 0)
    assert repeated > 0


def test_documents_beyond_a_full_leaf_are_counted_as_overflow() -> None:
    random = np.random.default_rng(0)
    config = DocidConfig(family="hkmeans", levels=3, hk=HkConfig(branch=2, leaf=3))
    documents = [Document(f"{i:03}", "", "") for i in range(40)]
    vectors = random.standard_normal((40, 8)).astype(np.float32)
    table = DocidTable.build(fit_space(config, documents[:6], vectors[:6], seed=0), documents[:6], vectors[:6])
    grown, report = table.insert(documents[6:], vectors[6:])
    # Two leaves of six indices each, for forty documents.
    assert len(np.unique(grown.codes, axis=0)) == 12
    assert report.overflow == 40 - 12


def test_random_documents_arrive_unreachable_and_unique(corpus: list[Document]) -> None:
    config = DocidConfig(family="random", levels=2, codes=64)
    table = DocidTable.build(fit_space(config, corpus[:300], None, seed=0), corpus[:300])
    grown, report = table.insert(corpus[300:500])
    assert report.unreachable == 200
    assert len(np.unique(grown.codes, axis=0)) == 500


def test_atomic_tables_take_no_documents(corpus: list[Document]) -> None:
    config = DocidConfig(family="atomic")
    table = DocidTable.build(fit_space(config, corpus[:9], None, seed=0), corpus[:9])
    with pytest.raises(Unsupported, match="atomic docids cannot be added"):
        table.insert(corpus[9:10])


def test_text_documents_without_tokens_are_counted(words: StaticEmbedding) -> None:
    config = DocidConfig(family="text.lead", levels=3)
    documents = [Document("a", "", "one two three"), Document("b", "", "four five six")]
    table = DocidTable.build(fit_space(config, documents, None, seed=0, tokenizer=words), documents)
    _, report = table.insert([Document("c", "", "two seven"), Document("d", "", "")])
    assert (report.documents, report.empty) == (2, 1)


def test_a_text_table_grows_by_the_tokens_that_documents_bring(words: StaticEmbedding, tmp_path: Path) -> None:
    config = DocidConfig(family="text.title", levels=3)
    documents = [Document("a", "one two", ""), Document("b", "four", "")]
    table = DocidTable.build(fit_space(config, documents, None, seed=0, tokenizer=words), documents)
    grown, _ = table.insert([Document("c", "seven two", "")])
    again, _ = grown.insert([Document("d", "seven", "")])
    assert (grown.sizes - table.sizes).tolist() == [len(grown.tokens)] * 3
    assert again.tokens.tolist() == grown.tokens.tolist()
    np.testing.assert_array_equal(grown.codes[:2], table.codes)
    assert grown.hash == table.hash  # a model of the first table fits the grown one
    assert tokens(grown.vocabulary, grown.codes[2:])[0] == words.encode(["seven two"])[0][:3]
    again.save(tmp_path)
    back = DocidTable.load(tmp_path, expect_hash=table.hash, tokenizer=words)
    assert back.tokens.tolist() == again.tokens.tolist()
    np.testing.assert_array_equal(back.sizes, again.sizes)


def test_ids_must_be_unique(coarse: DocidSpace, corpus: list[Document], embeddings: np.ndarray) -> None:
    with pytest.raises(DataError, match="occurs twice"):
        DocidTable.build(coarse, [corpus[0], corpus[0]], embeddings[:2])
    table = DocidTable.build(coarse, corpus[:5], embeddings[:5])
    with pytest.raises(DataError, match="already in the corpus"):
        table.insert(corpus[4:6], embeddings[4:6])
    with pytest.raises(ConfigError, match="collision='merge'"):
        DocidTable.build(coarse, corpus[:5], embeddings[:5], "merge")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_table_comes_back_whole(
    family: str,
    tmp_path: Path,
    corpus: list[Document],
    embeddings: np.ndarray,
    newcomers: tuple[list[Document], np.ndarray],
    words: StaticEmbedding,
) -> None:
    config = DocidConfig(family=family, levels=4, codes=16)
    space = fit_space(config, corpus, embeddings, seed=1, encoder_hash="e", tokenizer=words)
    collision = "bucket" if family in ("random", "atomic") else "append"
    table = DocidTable.build(space, corpus, embeddings, collision).delete([corpus[3].id])
    table.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [FACTS, ARRAYS]
    tokenizer = words if family.startswith("text") else None
    back = DocidTable.load(tmp_path, expect_hash=table.hash, tokenizer=tokenizer)
    assert back.hash == table.hash
    assert (back.doc_ids, back.collision, back.rows_version) == (table.doc_ids, collision, 1)
    for name in ("codes", "live", "sizes"):
        np.testing.assert_array_equal(getattr(back, name), getattr(table, name))
    if family != "atomic":
        np.testing.assert_array_equal(back.insert(*newcomers)[0].codes, table.insert(*newcomers)[0].codes)


def test_space_hash_refused(
    tmp_path: Path, coarse: DocidSpace, corpus: list[Document], embeddings: np.ndarray, words: StaticEmbedding
) -> None:
    table = DocidTable.build(coarse, corpus, embeddings)
    table.save(tmp_path)
    other = fit_space(COARSE, corpus, embeddings, seed=1, encoder_hash="e")
    with pytest.raises(DocidSpaceMismatch, match="use the table the model was trained with"):
        DocidTable.load(tmp_path, expect_hash=other.hash)
    with pytest.raises(DocidSpaceMismatch, match="another tokenizer"):
        DocidTable.load(tmp_path, tokenizer=words)
    grown, _ = table.insert([Document("new", "", "")], embeddings[:1])
    grown.save(tmp_path)
    assert len(DocidTable.load(tmp_path, expect_hash=table.hash)) == len(corpus) + 1

    facts = json.loads((tmp_path / FACTS).read_text())
    facts["meta"]["encoder_hash"] = "another"
    (tmp_path / FACTS).write_text(json.dumps(facts))
    with pytest.raises(DocidSpaceMismatch, match="differ from the hash"):
        DocidTable.load(tmp_path)


@pytest.mark.parametrize("name", [FACTS, ARRAYS])
def test_damaged_or_missing_files_are_named(
    name: str, tmp_path: Path, coarse: DocidSpace, corpus: list[Document], embeddings: np.ndarray
) -> None:
    with pytest.raises(ArtifactError, match="no readable docid table"):
        DocidTable.load(tmp_path)
    DocidTable.build(coarse, corpus, embeddings).save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="no readable docid table"):
        DocidTable.load(tmp_path)


def test_the_layout_for_lookups_is_that_of_the_codes(
    coarse: DocidSpace, corpus: list[Document], embeddings: np.ndarray
) -> None:
    table = DocidTable.build(coarse, corpus, embeddings)
    np.testing.assert_array_equal(table.columns.T, table.codes)
    longer = replace(table, codes=table.codes[:3], doc_ids=table.doc_ids[:3], live=table.live[:3])
    assert longer.columns.shape == (2, 3)
