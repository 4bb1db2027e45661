"""Documents come and go while the retriever application searches them."""

import asyncio
import json
import time
from itertools import count

import pytest

from mobula.errors import ArtifactError
from serve_apps.retriever import Corpus, RetrieverArgs
from serve_apps.retriever.schema import CHANGED_AT_ONCE, TEXT_BYTES
from tests.serving.asgi import ask, client, make
from tests.serving.toy import TEXTS, Toy, planned_changes

SQUID = {"id": "n1", "title": "Squid", "text": "giant squid of the deep"}


def add(app, *documents):
    return ask(app, "POST", "/documents", json={"documents": list(documents)})


def remove(app, *ids):
    return ask(app, "POST", "/documents/remove", json={"ids": list(ids)})


def found(app, query, k=100, **options):
    """Ids of the hits, and the version they are of."""
    answer = ask(app, "POST", "/search", json={"query": query, "k": k, **options})
    assert answer.status_code == 200, answer.text
    return [hit["doc_id"] for hit in answer.json()["hits"]], answer.json()["version"]


def events(text):
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in text.strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


# --- routes ---------------------------------------------------------------------------------------------------


def test_documents_are_found_once_added(tmp_path):
    app, _ = make(tmp_path, added=tmp_path / "added")
    assert found(app, "squid")[1] == 0
    answer = add(app, SQUID)
    assert answer.json() == {"added": 1, "version": 1, "codes": {"n1": [1, 2, 3, 4]}, "overflow": 0, "collisions": 0}
    assert found(app, "squid", k=1) == (["n1"], 1)


def test_removed_documents_are_gone_and_may_come_back(tmp_path):
    app, _ = make(tmp_path, added=tmp_path / "added")
    add(app, SQUID)
    assert remove(app, "n1", "d2").json() == {"removed": 2, "version": 2}
    hits, version = found(app, "squid")
    assert (sorted(hits), version) == (["d1", "d3", "d4"], 2)
    assert add(app, {**SQUID, "title": "Another"}).json()["version"] == 3
    hit = ask(app, "POST", "/search", json={"query": "squid", "k": 1}).json()["hits"][0]
    assert (hit["doc_id"], hit["title"]) == ("n1", "Another")


def test_every_document_may_be_removed(tmp_path):
    app, _ = make(tmp_path, added=tmp_path / "added")
    remove(app, *TEXTS)
    assert found(app, "squid") == ([], 1)
    assert ask(app, "GET", "/versions").json()["documents"] == 0


def test_versions_are_listed_newest_first(tmp_path):
    app, _ = make(tmp_path, added=tmp_path / "added")
    assert ask(app, "GET", "/versions").json() == {"version": 0, "documents": 4, "versions": []}
    add(app, SQUID, {"id": "n2", "text": "octopus"})
    remove(app, "d1")
    answer = ask(app, "GET", "/versions").json()
    assert (answer["version"], answer["documents"]) == (2, 5)
    assert [(v["version"], v["kind"], v["documents"]) for v in answer["versions"]] == [(2, "remove", 1), (1, "add", 2)]
    assert all(v["time"].endswith("+00:00") for v in answer["versions"])
    assert [v["version"] for v in ask(app, "GET", "/versions?limit=1").json()["versions"]] == [2]
    for wrong in ("limit=0", "limit=1001", "limit=x", "version=-1"):
        assert ask(app, "GET", f"/versions?{wrong}").status_code == 422
    assert ask(app, "GET", "/versions?version=3").json()["error"]["code"] == "version_not_reached"


@pytest.mark.parametrize(
    ("documents", "status", "code"),
    [
        ([{"id": "d1", "text": "again"}], 409, "duplicate"),
        ([{"id": "n", "text": "a"}, {"id": "n", "text": "b"}], 409, "duplicate"),
        ([], 422, "invalid_request"),
        ([{"id": "n", "text": ""}], 422, "invalid_request"),
        ([{"id": "n", "text": "x" * (TEXT_BYTES + 1)}], 422, "invalid_request"),
        ([{"id": "n", "text": "€" * (TEXT_BYTES // 3 + 1)}], 422, "invalid_request"),
        ([{"id": "n", "text": "x", "vector": [1]}], 422, "invalid_request"),
        ([{"id": "n", "text": "x", "date": "yesterday"}], 422, "invalid_request"),
        ([{"id": f"n{i}", "text": "x"} for i in range(CHANGED_AT_ONCE + 1)], 422, "invalid_request"),
    ],
)
def test_s3_documents_that_cannot_be_added_leave_nothing_behind(tmp_path, documents, status, code):
    app, state = make(tmp_path, added=tmp_path / "added")
    answer = add(app, *documents)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert_nothing_happened(tmp_path, state)


@pytest.mark.parametrize(
    ("ids", "status", "code"),
    [
        (["d1", "nobody"], 404, "not_found"),
        (["d1", "d1"], 409, "duplicate"),
        ([], 422, "invalid_request"),
        ([""], 422, "invalid_request"),
        ([1], 422, "invalid_request"),
        ([f"n{i}" for i in range(CHANGED_AT_ONCE + 1)], 422, "invalid_request"),
    ],
)
def test_s3_documents_that_cannot_be_removed_leave_nothing_behind(tmp_path, ids, status, code):
    app, state = make(tmp_path, added=tmp_path / "added")
    answer = remove(app, *ids)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert_nothing_happened(tmp_path, state)


def assert_nothing_happened(tmp_path, state):
    assert state.corpus.snapshot.version == 0 and set(state.corpus.searchable.documents) == set(TEXTS)
    assert not any(p.stat().st_size for p in (tmp_path / "added").iterdir())


def test_changes_are_refused_where_the_model_cannot_take_them(tmp_path):
    app, _ = make(tmp_path, Toy(frozen=True), added=tmp_path / "added")
    answer = add(app, SQUID)
    assert answer.status_code == 409 and "random" in answer.json()["error"]["message"]


def test_changes_are_refused_where_none_are_kept(tmp_path):
    app, _ = make(tmp_path)
    for answer in (add(app, SQUID), remove(app, "d1")):
        assert answer.status_code == 409 and "args.added" in answer.json()["error"]["message"]
    assert ask(app, "GET", "/versions").json()["version"] == 0


def test_s2_only_documents_may_be_large(tmp_path):
    app, _ = make(tmp_path, added=tmp_path / "added")
    full = [{"id": f"n{i}", "text": "squid " + "x" * (TEXT_BYTES - 6)} for i in range(CHANGED_AT_ONCE)]
    assert add(app, *full).json()["added"] == CHANGED_AT_ONCE
    assert len(found(app, "squid")[0]) == 100
    for path in ("/search", "/documents/remove"):
        assert ask(app, "POST", path, content=b"x" * 300_000).status_code == 413
    small, _ = make(tmp_path, max_documents_bytes=1024)
    assert ask(small, "POST", "/documents", content=b"x" * 1025).status_code == 413


def test_search_and_trace_refuse_a_version_that_nobody_has_written(tmp_path):
    app, _ = make(tmp_path, added=tmp_path / "added")
    add(app, SQUID)
    for path in ("/search", "/trace"):
        assert ask(app, "POST", path, json={"query": "squid", "version": 1}).status_code == 200
        answer = ask(app, "POST", path, json={"query": "squid", "version": 2})
        assert answer.status_code == 409 and answer.json()["error"]["code"] == "version_not_reached"
        assert ask(app, "POST", path, json={"query": "squid", "version": -1}).status_code == 422
    unchanging, _ = make(tmp_path)
    assert ask(unchanging, "POST", "/search", json={"query": "squid", "version": 1}).status_code == 409
    traced = events(ask(app, "POST", "/trace", json={"query": "squid"}).text)
    assert traced[-1][1]["version"] == 1


# --- replicas -------------------------------------------------------------------------------------------------


def test_changes_reach_other_replicas_and_survive_a_restart(tmp_path):
    first, _ = make(tmp_path, added=tmp_path / "added")
    second, _ = make(tmp_path, added=tmp_path / "added")
    add(first, SQUID)
    assert add(second, {"id": "n2", "text": "octopus"}).json()["version"] == 2
    remove(first, "d1")
    third, _ = make(tmp_path, added=tmp_path / "added")
    for app in (first, second, third):
        hits, version = found(app, "octopus", version=3)
        assert (sorted(hits), version) == (["d2", "d3", "d4", "n1", "n2"], 3)
    remove(second, "d2")
    rows = [ask(app, "GET", "/versions?version=4").json() for app in (first, second, third)]
    assert rows[0]["version"] == 4
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("path", ["/search", "/trace", "/versions", "/healthz"])
def test_replica_follows_the_others_without_being_told_a_version(tmp_path, path):
    writer, _ = make(tmp_path, added=tmp_path / "added")
    app, state = make(tmp_path, added=tmp_path / "added")
    add(writer, SQUID)
    method, body = ("POST", {"query": "squid"}) if path in ("/search", "/trace") else ("GET", None)
    assert ask(app, method, path, json=body).status_code == 200
    wait_until(lambda: state.corpus.snapshot.version == 1)
    assert found(app, "squid", k=1) == (["n1"], 1)


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_damaged_journal_makes_the_replica_unhealthy_and_it_goes_on_searching(tmp_path):
    app, _ = make(tmp_path, added=tmp_path / "added")
    add(app, SQUID)
    (journal,) = (tmp_path / "added").iterdir()
    with journal.open("r+b") as stream:
        stream.truncate(3)
    assert ask(app, "POST", "/search", json={"query": "squid", "version": 2}).status_code == 500
    assert ask(app, "GET", "/healthz").status_code == 503
    assert found(app, "squid", k=1) == (["n1"], 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"kind": "move", "items": [], "time": null}', "not a record of kind add or remove"),
        ("[1]", "argument after"),
        ("{", "Expecting"),
        ('{"kind": "remove", "items": ["nobody"], "time": null}', "'nobody' is not in the corpus"),
    ],
)
def test_journal_that_does_not_fit_is_refused_with_the_reason(tmp_path, line, reason):
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / f"{'0' * 16}.jsonl").write_text(f"{line}\n")
    with pytest.raises(ArtifactError, match=f"line at byte 0 cannot be applied .*{reason}"):
        make(tmp_path, added=tmp_path / "added")


def test_journals_of_before_removals_are_read(tmp_path):
    (tmp_path / "added").mkdir()
    lines = [[{**SQUID, "date": None}], [{"id": "n2", "title": "", "text": "octopus", "date": "2024-01-01"}]]
    (tmp_path / "added" / f"{'0' * 16}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    app, _ = make(tmp_path, added=tmp_path / "added")
    assert found(app, "squid octopus", k=2) == (["n1", "n2"], 2)
    assert ask(app, "GET", "/versions").json()["versions"][0] == {
        "version": 2, "kind": "add", "documents": 1, "time": None,
    }  # fmt: skip
    assert remove(app, "n1").json()["version"] == 3


# --- readers and writers --------------------------------------------------------------------------------------


def test_searches_do_not_wait_for_documents_that_are_being_encoded(tmp_path):
    app, _ = make(tmp_path, Toy(add_s=2.0), added=tmp_path / "added")

    async def run():
        async with client(app) as http:
            writing = asyncio.create_task(http.post("/documents", json={"documents": [SQUID]}))
            await asyncio.sleep(0.2)
            start = time.monotonic()
            answers = [await http.post("/search", json={"query": "squid"}) for _ in range(5)]
            took = time.monotonic() - start
            done = writing.done()
            latest = await http.post("/search", json={"query": "squid", "version": 1})
            return answers, took, done, latest, await writing

    answers, took, done, latest, written = asyncio.run(run())
    assert [a.json()["version"] for a in answers] == [0] * 5
    assert took < 1 and not done
    # Who asks for the version that is being written gets it.
    assert latest.json()["version"] == written.json()["version"] == 1


def test_s5_change_over_its_time_is_408_and_is_not_made(tmp_path):
    app, state = make(tmp_path, Toy(add_s=0.5), added=tmp_path / "added", time_limit_s=0.2)
    answer = add(app, SQUID)
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "timeout"
    time.sleep(0.6)
    assert_nothing_happened(tmp_path, state)
    assert remove(app, "d1").json() == {"removed": 1, "version": 1}


def test_addition_that_one_retriever_refuses_is_in_none(tmp_path):
    toy = Toy()

    def broken(documents):
        raise RuntimeError("no room")

    toy.retrievers["twin"].insert = broken
    app, state = make(tmp_path, toy, added=tmp_path / "added")
    assert add(app, SQUID).status_code == 500
    assert_nothing_happened(tmp_path, state)
    assert all("n1" not in r.documents for r in state.corpus.searchable.retrievers.values())


def test_concurrent_add_and_search(tmp_path):
    """200 searches and more during 20 additions and removals: each is of exactly one version (spec, test 21)."""
    app, _ = make(tmp_path, Toy(step_s=0.002, add_s=0.05), added=tmp_path / "added")
    requests, states = planned_changes(20)
    assert len({frozenset(state.items()) for state in states}) == 21
    acknowledged, numbers, seen = [0], count(), set()

    async def write(http):
        for path, body in requests:
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            acknowledged.append(answer.json()["version"])

    async def read(http):
        while (number := next(numbers)) < 200 or acknowledged[-1] < 20:
            least = acknowledged[-1]
            retriever = "twin" if number % 2 else "words"
            request = {"query": "marker", "k": 100, "steps": 2, "retriever": retriever, "version": least}
            answer = await http.post("/search", json=request)
            assert answer.status_code == 200, answer.text
            version = answer.json()["version"]
            assert version >= least
            assert {h["doc_id"]: h["title"] for h in answer.json()["hits"]} == states[version]
            seen.add(version)
            await asyncio.sleep(0.005)

    async def run():
        async with client(app) as http:
            await asyncio.gather(write(http), *(read(http) for _ in range(8)))

    asyncio.run(run())
    assert acknowledged == list(range(21)) and len(seen) > 10


def test_corpus_of_a_missing_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError):
        Corpus.load(RetrieverArgs(artifact=tmp_path / "none", added=tmp_path / "added"))
    assert not (tmp_path / "added").exists()
