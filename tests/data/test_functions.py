"""The default corpus: functions and requests of the bfcl-eval wheel."""

import json
import sys

import pytest

from mobula.data import DataConfig, load_retrieval
from mobula.data.functions import purpose, readable
from mobula.errors import BadRecord, DataError


@pytest.fixture(scope="module")
def functions():
    return load_retrieval(DataConfig(), quiet=True)


def test_counts_merged_by_function_name(functions):
    queries = [query for found in functions.queries.values() for query in found]
    assert len(functions.documents) == 1853
    assert len(queries) == 2501
    assert len({id for query in queries for id in query.gold}) == 1147
    assert functions.records == 1853 + 2501


def test_files_are_read_without_importing_the_package(functions):
    assert functions.source.startswith("package bfcl-eval")
    assert "bfcl_eval" not in sys.modules


def test_parallel_calls_have_several_gold_functions(functions):
    golds = [set(q.gold) for found in functions.queries.values() for q in found if q.id == "parallel_multiple_0"]
    assert golds == [{"math_toolkit.sum_of_multiples", "math_toolkit.product_of_primes"}]


def test_ambiguous_requests_are_counted(functions):
    assert functions.notes["documents with a near-duplicate"] > 40
    assert functions.notes["queries a near-duplicate makes ambiguous"] > 80


def test_by_document_keeps_test_functions_unseen():
    data = load_retrieval(DataConfig(split="by_document"), quiet=True)
    asked = {id for split in ("train", "dev") for query in data.queries[split] for id in query.gold}
    assert len(data.queries["test"]) > 500
    assert not any(set(query.gold) & asked for query in data.queries["test"])


def test_by_request_leaves_functions_seen_and_unseen(functions):
    asked = {id for query in functions.queries["train"] for id in query.gold}
    seen = [bool(set(query.gold) & asked) for query in functions.queries["test"]]
    assert 0 < sum(seen) < len(seen)


def test_fingerprint_is_stable_and_depends_on_the_split(functions):
    assert load_retrieval(DataConfig(), quiet=True).sha256 == functions.sha256
    assert load_retrieval(DataConfig(seed=1), quiet=True).sha256 != functions.sha256


def test_readable_names_and_purpose():
    assert readable("geo.findNearest_city") == "geo find Nearest city"
    assert purpose("Calculates the area of a circle.\nradius: x") == purpose("Calculate the area of the circle")


def test_a_request_without_a_gold_call_is_refused(tmp_path):
    from mobula.data.functions import DISTRACTORS, WITH_GOLD

    (tmp_path / "possible_answer").mkdir()
    for category in (*WITH_GOLD, *DISTRACTORS):
        (tmp_path / f"BFCL_v4_{category}.json").write_text("")
        (tmp_path / "possible_answer" / f"BFCL_v4_{category}.json").write_text("")
    record = {"id": "simple_python_0", "question": [[{"role": "user", "content": "hi"}]], "function": [{"name": "f"}]}
    (tmp_path / "BFCL_v4_simple_python.json").write_text(json.dumps(record))
    with pytest.raises(BadRecord, match=r"line 1: request simple_python_0 has no gold call"):
        load_retrieval(DataConfig(path=str(tmp_path)), quiet=True)


def test_a_path_without_the_files_never_falls_back_to_the_package(tmp_path):
    with pytest.raises(DataError, match=r"data\.path"):
        load_retrieval(DataConfig(path=str(tmp_path)), quiet=True)
