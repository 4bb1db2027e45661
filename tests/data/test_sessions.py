"""Corpora that grow: sessions, and who asks for what in which."""

import json
from dataclasses import replace

import pytest

from mobula.config import build
from mobula.data import DataConfig, Document, Query, RetrievalData, load_retrieval
from mobula.data.sessions import SessionPlan, SessionRow, SessionsConfig, plan_sessions
from mobula.environment import data_folder
from mobula.errors import ConfigError, DataError

needs_data = pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set")


def documents(count, **fields):
    """Documents d0, d1, ... of one year each, the oldest last in the corpus."""
    dates = [f"{2000 + count - i}-01-01" for i in range(count)]
    return [Document(f"d{i}", f"title {i}", f"text {i}", dates[i], **fields) for i in range(count)]


def corpus(docs, **queries):
    return RetrievalData("made", "here", "", docs, queries)


def ask(id, *gold, text=None, **fields):
    return Query(id, text or f"words of {id} alone", gold, **fields)


def sizes(plan, sessions):
    return [list(plan.session_of.values()).count(session) for session in range(sessions + 1)]


def test_the_oldest_share_comes_first_and_undated_documents_are_left_out():
    docs = [*documents(21), Document("undated", "", "x")]
    plan = plan_sessions(corpus(docs), SessionsConfig(sessions=4))
    assert plan.sizes == [10, 3, 3, 2, 3] == sizes(plan, 4)
    assert plan.notes["documents left out for want of a date"] == 1
    # d20 is the oldest.
    assert [plan.session_of[f"d{i}"] for i in range(20, -1, -1)] == sorted(plan.session_of.values())
    assert [d.id for d in plan.documents(docs, 0)] == [f"d{i}" for i in range(11, 21)]
    assert [d.id for d in plan.documents(docs, 1)] == ["d8", "d9", "d10"]
    assert "undated" not in plan.session_of


@pytest.mark.parametrize(
    ("count", "sessions", "initial"), [(736, 5, 0.5), (100, 7, 0.29), (11, 10, 0.1), (584, 5, 0.5)]
)
def test_sizes_differ_by_at_most_one(count, sessions, initial):
    plan = plan_sessions(corpus(documents(count)), SessionsConfig(sessions=sessions, initial=initial))
    assert plan.sizes[0] == round(initial * count)
    assert max(plan.sizes[1:]) - min(plan.sizes[1:]) <= 1
    assert sum(plan.sizes) == count


def test_groups_not_split():
    """Equal texts share a session; with random, equal titles do too, also where titles have become queries."""
    docs = documents(40)
    docs[0] = replace(docs[0], text="Text, 39!")
    docs[1] = replace(docs[1], title="TITLE 38")
    dated = plan_sessions(corpus(docs), SessionsConfig())
    assert dated.session_of["d0"] == dated.session_of["d39"] == 0
    assert dated.session_of["d1"] == 5 != dated.session_of["d38"]
    assert dated.notes["documents that join an identical one in an earlier session"] == 1
    titles = [ask(f"{d.id}#title", d.id, text=d.title) for d in docs]
    stripped = [replace(d, title="") for d in docs]
    apart = 0
    for seed in range(20):
        drawn = plan_sessions(corpus(docs), SessionsConfig(split="random", seed=seed))
        assert drawn.session_of["d0"] == drawn.session_of["d39"]
        assert drawn.session_of["d1"] == drawn.session_of["d38"]
        apart += drawn.session_of["d0"] != drawn.session_of["d1"]
        asked = plan_sessions(corpus(stripped, test=titles), SessionsConfig(split="random", seed=seed))
        assert asked.session_of == drawn.session_of
    assert apart > 5


def test_a_random_split_is_seeded():
    data = corpus(documents(60), test=[ask("q", "d1")])
    plans = [plan_sessions(data, SessionsConfig(split="random", seed=seed)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] and plans[0].hash == plans[1].hash
    assert plans[0].session_of != plans[2].session_of and plans[0].hash != plans[2].hash
    assert plans[0].sizes == [30, 6, 6, 6, 6, 6]


def test_sources_arrive_one_after_another():
    docs = [replace(d, source="zebra" if i % 2 else "ant") for i, d in enumerate(documents(20))]
    plan = plan_sessions(corpus([*docs[1:], docs[0]]), SessionsConfig(split="source", sessions=2))
    assert {d.source for d in plan.documents(docs, 0)} == {"zebra"}
    assert {d.source for d in docs if plan.session_of[d.id]} == {"ant"}
    assert plan.sizes == [10, 5, 5]


def test_multi_gold_rows():
    """Gold by session, grades aligned; other relevant documents and the source document are neutral."""
    docs = documents(10)
    query = ask("q", "d0", "d9", "d4", "d8", grades=(4, 3, 2, 1), source_doc="d7")
    plan = plan_sessions(corpus(docs, test=[query]), SessionsConfig())
    assert [(r.session, r.query.gold, r.query.grades) for r in plan.test] == [
        (0, ("d9", "d8"), (3, 1)),
        (1, ("d4",), (2,)),
        (5, ("d0",), (4,)),
    ]
    assert [r.neutral for r in plan.test] == [
        {"d0", "d4", "d7"},
        {"d0", "d7", "d8", "d9"},
        {"d4", "d7", "d8", "d9"},
    ]
    assert plan.rows(1) == plan.test[1:2] and plan.rows(2) == []
    assert {(r.query.id, r.query.text) for r in plan.test} == {(query.id, query.text)}


def test_train_and_dev_queries_are_of_the_initial_documents():
    docs = documents(10)
    train = [ask("a", "d9"), ask("b", "d0", "d8", grades=(1, 2)), ask("c", "d1", "d0")]
    dev = [ask("e", "d7"), ask("f", "d2"), ask("d0#held_out", "d0"), ask("d9#held_out", "d9")]
    data = corpus(docs, train=train, dev=dev, test=[ask("t", "d9"), ask("u", "gone")], given=[ask("g", "d9")])
    plan = plan_sessions(data, SessionsConfig())
    assert [(q.id, q.gold, q.grades) for q in plan.train] == [("a", ("d9",), None), ("b", ("d8",), (2,))]
    assert [q.id for q in plan.dev] == ["e", "d9#held_out"]
    assert [(r.query.id, r.session) for r in plan.test] == [("c", 4), ("c", 5), ("f", 3), ("t", 0)]
    assert plan.notes["held-out windows of later documents, not used"] == 1
    assert plan.notes["queries without a document in any session"] == 1


def test_near_duplicates_leave_the_training_side():
    words = "one two three four five six seven eight nine"
    train = [ask("a", "d9", text=words), ask("b", "d8", text="something else entirely")]
    dev = [ask("c", "d7", text=f"{words} ten")]
    test = [ask("t", "d1", "d9", text=words.upper())]
    plan = plan_sessions(corpus(documents(10), train=train, dev=dev, test=test), SessionsConfig())
    assert ([q.id for q in plan.train], plan.dev) == (["b"], [])
    assert [(r.query.id, r.session) for r in plan.test] == [("t", 0), ("t", 4)]
    assert plan.notes["train and dev queries dropped as near-duplicates of dev or test queries"] == 2


def test_citing_documents_decide_where_a_query_belongs():
    docs = documents(10)
    cites = [(9, 8), (8, 9), (7, 9), (6, 9), (5, 9), (4, 9), (9, 0), (0, 1)]
    queries = [ask(f"d{a}#{i}", f"d{b}", source_doc=f"d{a}") for i, (a, b) in enumerate(cites)]
    queries.append(ask("cut#0", "d9", source_doc="cut"))
    # The splits that the queries come with do not matter.
    data = corpus(docs, train=queries[::3], dev=queries[1::3], test=queries[2::3])
    plan = plan_sessions(data, SessionsConfig(queries="by_source_doc"))
    assert [q.source_doc for q in plan.train] == ["d9", "d8", "d7", "d6"]
    assert [q.source_doc for q in plan.dev] == ["d5"]
    assert [(r.query.source_doc, r.query.gold, r.session) for r in plan.test] == [
        ("d0", ("d1",), 4),
        ("d4", ("d9",), 0),
        ("d9", ("d0",), 5),
    ]
    assert [r.neutral for r in plan.test] == [{"d0"}, {"d4"}, {"d9"}]
    assert plan.notes["queries of initial documents taken from one that was left out"] == 1
    everywhere = corpus(docs, all=[], test=queries)
    assert plan_sessions(everywhere, SessionsConfig(queries="by_source_doc")).hash == plan.hash


def test_what_cannot_be_divided_is_an_error():
    undated = [replace(d, date=None) for d in documents(10)]
    with pytest.raises(DataError, match=r"made: no document has a date, so sessions\.split=date"):
        plan_sessions(corpus(undated), SessionsConfig())
    with pytest.raises(DataError, match="no document has a source"):
        plan_sessions(corpus(undated), SessionsConfig(split="source"))
    with pytest.raises(DataError, match=r"session 2 of 0\.\.9 has none of the 10 documents"):
        plan_sessions(corpus(documents(10)), SessionsConfig(sessions=9))
    same = [replace(d, text="all the same") for d in documents(10)]
    with pytest.raises(DataError, match=r"session 1 of 0\.\.5 has none"):
        plan_sessions(corpus(same), SessionsConfig())
    with pytest.raises(DataError, match=r"query 'q' has no source document.*sessions\.queries=given"):
        plan_sessions(corpus(documents(10), test=[ask("q", "d1")]), SessionsConfig(queries="by_source_doc"))
    with pytest.raises(DataError, match=r"leave data\.dev_windows null"):
        windows = [ask("d1#held_out", "d1")]
        plan_sessions(corpus(documents(10), dev=windows), SessionsConfig(queries="by_source_doc"))
    with pytest.raises(ConfigError, match="initial"):
        build(SessionsConfig, {"initial": 1.0})


def test_a_saved_plan_is_the_same_plan(tmp_path):
    queries = [ask("a", "d9", "d1", grades=(2, 1), source_doc="d8")]
    data = corpus(documents(10), train=[ask("b", "d9")], dev=[ask("c", "d8")], test=queries)
    plan = plan_sessions(data, SessionsConfig())
    plan.save(tmp_path / "plan.json")
    again = SessionPlan.load(tmp_path / "plan.json")
    assert again == plan and again.hash == plan.hash
    assert isinstance(again.test[0], SessionRow) and again.test[0].neutral == {"d1", "d8"}
    value = json.loads((tmp_path / "plan.json").read_text())
    value["session_of"]["d9"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match="damaged or changed"):
        SessionPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="not a plan of sessions"):
        SessionPlan.load(tmp_path / "plan.json")


@needs_data
def test_cacm_tests_judged_queries_and_uses_windows_of_initial_documents_alone():
    data = load_retrieval(DataConfig(name="cacm"), quiet=True)
    plan = plan_sessions(data, SessionsConfig())
    assert plan.sizes == [1602, 320, 321, 320, 321, 320]
    assert plan.train == []
    assert plan.dev and all(plan.session_of[q.gold[0]] == 0 for q in plan.dev)
    assert len(plan.dev) + plan.notes["held-out windows of later documents, not used"] == 200
    assert [len(plan.rows(session)) for session in range(6)] == [31, 33, 34, 42, 44, 46]
    assert len({row.query.id for row in plan.test}) == 52
    whole = {q.id: set(q.gold) for q in data.queries["test"]}
    assert all(set(row.query.gold) | row.neutral == whole[row.query.id] for row in plan.test)


def test_functions_arrive_by_category():
    data = load_retrieval(DataConfig(), quiet=True)
    sources = {d.id: d.source for d in data.documents}
    assert sources["math_toolkit.sum_of_multiples"] == "parallel_multiple"
    assert len(set(sources.values())) == 13
    plan = plan_sessions(data, SessionsConfig(split="source"))
    order = list(dict.fromkeys(d.source for d in data.documents))
    places = [order.index(sources[id]) for id in plan.session_of]
    assert places == sorted(places)
    assert min(len(plan.rows(session)) for session in range(6)) > 0
