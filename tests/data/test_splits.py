"""Duplicates, splits and pseudo-queries."""

import itertools
import random
import tracemalloc

import pytest

from mobula.data import DataConfig, Document, Query, RetrievalData, export, load_retrieval
from mobula.data import duplicates as dup
from mobula.data.pseudo_queries import (
    KeyPhrases,
    chunks,
    generator,
    hold_out_windows,
    make_pseudo_queries,
    read_pseudo_queries,
    windows,
)
from mobula.data.splits import divide, drop_leaks
from mobula.errors import BadRecord, DataError


def query(id, text, *gold):
    return Query(id, text, gold or ("d",))


@pytest.mark.parametrize("block", [1, 100, dup.BLOCK])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_pairs_match_brute_force(threshold, block, monkeypatch):
    monkeypatch.setattr(dup, "BLOCK", block)
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefghijkl", k=rng.randint(0, 12))) for _ in range(150)]
    sets = [frozenset(text.split()) for text in texts]
    pairs = itertools.combinations(range(len(texts)), 2)
    expected = {(i, j) for i, j in pairs if dup.jaccard(sets[i], sets[j]) >= threshold}
    found = [tuple(sorted(pair)) for pair in dup.near_pairs(texts, threshold)]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert expected


@pytest.mark.parametrize("texts", [[], [""], ["", "?"], ["a", ""]])
def test_texts_without_words_have_no_near_duplicate(texts):
    assert list(dup.near_pairs(texts, 0.5)) == []


def test_near_pairs_hold_a_block_at_a_time(monkeypatch):
    """All texts stand in the lists of all words: half a million entries, of which a block is held."""
    monkeypatch.setattr(dup, "BLOCK", 2000)
    texts = [" ".join(f"w{(i * j) % 40}" for j in range(8)) for i in range(600)]
    tracemalloc.start()
    found = sum(1 for _ in dup.near_pairs(texts, 0.9))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found > 600
    assert peak < 3_000_000


def test_near_duplicate_documents_are_counted_up_to_a_size(tmp_path):
    documents = [Document("1", "", "one two three four five"), Document("2", "", "one two three four five six")]
    documents.append(Document("3", "", "something else"))
    queries = [query(str(i), f"unique{i} words{i}", "3") for i in range(20)]
    queries.append(query("unclear", "one two", "1"))
    export(RetrievalData("x", "x", "", documents, {"all": queries}), tmp_path)
    config = {"name": "files", "path": str(tmp_path)}
    counted = load_retrieval(DataConfig(**config, count_duplicates_up_to=3), quiet=True)
    not_counted = load_retrieval(DataConfig(**config, count_duplicates_up_to=2), quiet=True)
    near, ambiguous = "documents with a near-duplicate", "queries a near-duplicate makes ambiguous"
    assert (counted.notes[near], counted.notes[ambiguous]) == (2, 1)
    assert "not counted: more documents than data.count_duplicates_up_to=2" in not_counted.notes[near]
    assert not_counted.notes[near] == not_counted.notes[ambiguous]
    assert not_counted.queries == counted.queries


def test_normalised_text_is_lower_case_and_alphanumeric():
    assert dup.normalise("  It's a_TEST: naïve, 北京! ") == "it s a test naïve 北京"


def test_duplicates(tmp_path):
    """Identical texts become multi-gold; no near-duplicate query stands in two splits."""
    documents = [Document("1", "", "same words here"), Document("2", "", "Same words, HERE!"), Document("3", "", "x")]
    queries = [query(str(i), f"the question number {i} about topic{i % 40} word{i}", "1") for i in range(100)]
    queries.append(query("twin", "The question; number 0 about topic0 WORD0", "3"))
    export(RetrievalData("x", "x", "", documents, {"all": queries}), tmp_path)
    data = load_retrieval(DataConfig(name="files", path=str(tmp_path)), quiet=True)
    assert all(q.gold in {("1", "2"), ("3",)} for found in data.queries.values() for q in found)
    assert data.notes["queries given an identical document as further gold"] == 100
    homes = {q.id: split for split, found in data.queries.items() for q in found}
    assert homes["0"] == homes["twin"]
    forms = [{dup.normalise(q.text) for q in found} for found in data.queries.values()]
    assert not any(a & b for a, b in itertools.combinations(forms, 2))


def test_shares_are_met_and_order_is_kept():
    queries = [query(f"{i:03d}", f"unique{i} words{i}") for i in range(200)]
    options = {"by_document": False, "threshold": 0.8, "seed": 3}
    divided = divide(queries, {"test": 0.25, "dev": 0.1}, "train", **options)
    assert {name: len(found) for name, found in divided.items()} == {"test": 50, "dev": 20, "train": 130}
    assert all([q.id for q in found] == sorted(q.id for q in found) for found in divided.values())
    assert divide(queries, {"test": 0.25, "dev": 0.1}, "train", **options) == divided
    assert divide(queries, {"test": 0.25, "dev": 0.1}, "train", **{**options, "seed": 4}) != divided


def test_given_test_queries_stay_and_their_twins_leave_training():
    queries = {"train": [query("a", "one two three"), query("b", "four five")], "test": [query("c", "one two three")]}
    kept, dropped = drop_leaks(queries, 0.8)
    assert dropped == 1
    assert [q.id for q in kept["train"]] == ["b"]
    assert [q.id for q in kept["test"]] == ["c"]


def test_windows_are_contiguous_and_of_the_length_asked_for():
    words = [f"w{i}" for i in range(60)]
    found = windows(" ".join(words), 300, generator(0, "window", "d"))
    lengths = {len(text.split()) for text in found}
    assert min(lengths) >= 8 and max(lengths) <= 24 and len(lengths) > 10
    assert all(text in " ".join(words) for text in found)
    assert {text.split()[0] for text in found} >= {"w0"}
    assert any(text.endswith("w59") for text in found)
    assert windows("only four words here", 2, generator(0, "window", "d")) == ["only four words here"] * 2
    assert windows("  ", 2, generator(0, "window", "d")) == []


def test_views_are_deterministic_and_independent_of_other_documents():
    documents = [Document(str(i), f"title {i}", " ".join(f"w{i}x{j}" for j in range(50))) for i in range(3)]
    first = make_pseudo_queries(documents, "window", 5, seed=1)
    assert make_pseudo_queries(documents[:1], "window", 5, seed=1) == first[:5]
    assert make_pseudo_queries(documents, "window", 5, seed=2) != first
    assert [query.gold for query in first] == [(str(i),) for i in range(3) for _ in range(5)]


def test_title_views_are_the_titles_of_those_that_have_one():
    queries = make_pseudo_queries([Document("1", "a title", "text"), Document("2", "", "text")], "title", 5, seed=0)
    assert [(query.text, query.gold) for query in queries] == [("a title", ("1",))]


def test_held_out_windows_stay_out_of_pseudo_queries():
    documents = [Document("1", "", " ".join(f"w{j}" for j in range(40)))]
    held = hold_out_windows(documents, 1, seed=0)
    queries = make_pseudo_queries(documents, "window", 500, seed=5, held_out=held)
    words = frozenset(held[0].text.split())
    assert 0 < len(queries) < 500
    assert all(dup.jaccard(words, frozenset(query.text.split())) < 0.8 for query in queries)


def test_key_phrases_prefer_rare_terms():
    documents = [Document(str(i), "", f"common shared rare{i}") for i in range(50)]
    documents.append(Document("x", "", "other"))
    phrases = KeyPhrases(documents).sample("common shared rare7", 400, generator(0, "k", "7"), low=1, high=1)
    assert phrases.count("rare7") > 350


def test_chunks_cover_the_text():
    assert chunks("a b c d e", 2) == ["a b", "c d", "e"]


def test_external_views_are_checked(tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text('{"doc_id": "1", "text": "a question"}\n{"doc_id": "9", "text": "x"}\n')
    with pytest.raises(BadRecord, match=r"line 2: field doc_id='9' is not a document"):
        read_pseudo_queries(path, [Document("1", "", "t")])
    path.write_text('{"doc_id": "1", "text": "a question"}\n')
    queries = make_pseudo_queries([Document("1", "", "t")], "file", 3, 0, path=path)
    assert [(v.text, v.gold) for v in queries] == [("a question", ("1",))]


def test_empty_documents_give_no_pseudo_queries():
    with pytest.raises(DataError, match="no window pseudo-query"):
        make_pseudo_queries([Document("1", "", "")], "window", 3, 0)
