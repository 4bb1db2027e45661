"""The retriever application in this process, through ASGI."""

import asyncio
import json
import logging
import time

import pytest

from mobula.errors import ConfigError
from mobula.retrieval.search import Hit, SearchResult
from serve_apps.retriever import RetrieverArgs
from tests.serving.asgi import ask, client, make
from tests.serving.toy import LEVELS, TEXTS, Toy

KEY = "a-long-enough-secret-key"


def test_search_returns_hits_and_their_cost(tmp_path):
    app, _ = make(tmp_path)
    answer = ask(app, "POST", "/search", json={"query": "warm seas", "k": 2, "steps": 3}).json()
    assert [h["doc_id"] for h in answer["hits"]] == ["d3", "d4"]
    assert answer["hits"][0]["title"] == "Rays"
    assert answer["steps_used"] == 3 and answer["budget"]["steps"] == 3 and answer["ms"] > 0


def retrieve(app, queries, **more):
    return ask(app, "POST", "/retrieve", json={"queries": queries, **more})


def test_retrieve_answers_a_batch_with_contents(tmp_path):
    app, _ = make(tmp_path)
    answer = retrieve(app, ["warm seas", "dogs bark"], topk=2, return_scores=True)
    seas, dogs = answer.json()["result"]
    assert seas[0] == {"document": {"id": "d3", "contents": f'"Rays"\n{TEXTS["d3"][1]}'}, "score": 2.0}
    assert [row["document"]["id"] for row in seas] == ["d3", "d4"] and dogs[0]["document"]["id"] == "d2"
    (alone,) = retrieve(app, ["warm seas"], topk=1).json()["result"]
    assert alone == [seas[0]["document"]]
    assert len(retrieve(app, ["warm seas"]).json()["result"][0]) == 4


def test_retrieve_searches_once_for_many_and_lets_others_between(tmp_path):
    toy = Toy()
    words, sizes = toy.retrievers["words"], []
    search = words.search
    words.search = lambda queries, options: sizes.append(len(queries)) or search(queries, options)
    app, _ = make(tmp_path, toy)
    assert len(retrieve(app, ["cats"] * 40).json()["result"]) == 40
    assert sizes == [40]


@pytest.mark.parametrize(
    "change",
    [
        {"queries": []},
        {"queries": ["cats", " "]},
        {"queries": ["x" * 2001]},
        {"queries": ["cats"] * 513},
        {"queries": "cats"},
        {"topk": 0},
        {"topk": 101},
        {"return_scores": 1},
        {"retriever": "twin"},
    ],
    ids=str,
)
def test_retrieve_refuses_with_the_reason(tmp_path, change):
    app, _ = make(tmp_path)
    answer = ask(app, "POST", "/retrieve", json={"queries": ["cats"], **change})
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "invalid_request"
    (name,) = change
    assert name in answer.text


def test_retrieve_that_takes_too_long_is_stopped(tmp_path):
    heartbeat = tmp_path / "steps"
    app, _ = make(tmp_path, Toy(step_s=0.05, heartbeat=heartbeat), time_limit_s=0.2)
    assert retrieve(app, ["cats"] * 512).status_code == 408
    time.sleep(0.3)
    steps = heartbeat.stat().st_size
    time.sleep(0.3)
    assert heartbeat.stat().st_size == steps


def test_a_score_that_json_cannot_hold_is_null(tmp_path):
    app, state = make(tmp_path)
    words = state.corpus.searchable.retrievers["words"]
    words.search = lambda queries, options: [SearchResult([Hit("d1", float("-inf"))])]
    assert retrieve(app, ["cats"], return_scores=True).json()["result"][0][0]["score"] is None


def test_no_budget_means_half_the_code_length(tmp_path):
    app, _ = make(tmp_path)
    assert ask(app, "POST", "/search", json={"query": "cats"}).json()["budget"]["steps"] == LEVELS // 2


def test_retriever_searches_with_its_own_decoder_and_refuses_others(tmp_path):
    app, _ = make(tmp_path)
    assert ask(app, "POST", "/search", json={"query": "cats"}).json()["decoder"] == "match_rerank"
    assert ask(app, "POST", "/search", json={"query": "cats", "retriever": "twin"}).json()["decoder"] == "beam"
    wrong = ask(app, "POST", "/search", json={"query": "cats", "retriever": "twin", "decoder": "match"})
    assert wrong.status_code == 422 and "twin has beam, greedy, exhaustive" in wrong.json()["error"]["message"]
    assert ask(app, "GET", "/retrievers").json()["decoders"]["twin"] == ["beam", "greedy", "exhaustive"]


def test_long_texts_are_cut_between_words(tmp_path):
    app, _ = make(tmp_path, added=tmp_path / "added")
    texts = {"words": "squid " * 100, "one": "x" * 500}
    documents = [{"id": name, "title": "squid", "text": text} for name, text in texts.items()]
    ask(app, "POST", "/documents", json={"documents": documents}).raise_for_status()
    hits = ask(app, "POST", "/search", json={"query": "squid", "k": 2}).json()["hits"]
    snippets = {h["doc_id"]: h["snippet"] for h in hits}
    assert snippets["words"].endswith("squid …") and snippets["one"] == "x" * 240 + " …"


def test_max_ms_picks_the_largest_budget_that_fits(tmp_path):
    app, state = make(tmp_path, Toy(step_s=0.01), calibration_s=20)
    table = state.corpus.calibration.p95_ms["match_rerank"]
    assert set(table) == {1, 2, 4} and table[1] < table[4]
    limit = int((table[2] + table[4]) / 2)
    budget = ask(app, "POST", "/search", json={"query": "cats", "max_ms": limit}).json()["budget"]
    assert budget == {"steps": 2, "threshold": None, "max_ms": limit, "over_budget": False}


def test_max_ms_that_nothing_fits_falls_back_to_one_pass_and_says_so(tmp_path):
    app, _ = make(tmp_path, Toy(step_s=0.01), calibration_s=20)
    answer = ask(app, "POST", "/search", json={"query": "cats", "max_ms": 1}).json()
    assert answer["decoder"] == "one_pass" and answer["budget"]["over_budget"]


def test_max_ms_without_a_measurement_is_refused(tmp_path):
    app, _ = make(tmp_path)
    answer = ask(app, "POST", "/search", json={"query": "cats", "max_ms": 10})
    assert answer.status_code == 422 and "steps" in answer.json()["error"]["message"]


BAD = {
    "k zero": {"k": 0},
    "k above its limit": {"k": 101},
    "k of a wrong type": {"k": "5"},
    "k null": {"k": None},
    "text over its limit": {"query": "x" * 2001},
    "empty text": {"query": ""},
    "blank text": {"query": "  \n"},
    "text of a wrong type": {"query": 7},
    "lone surrogate": {"query": "\ud800"},
    "extra field": {"colour": "red"},
    "unknown decoder": {"decoder": "greedy!"},
    "unknown retriever": {"retriever": "nobody"},
    "steps and threshold": {"steps": 2, "threshold": 0.5},
    "steps and max_ms": {"steps": 2, "max_ms": 5},
    "threshold of one": {"threshold": 1.0},
    "threshold with remask": {"threshold": 0.5, "remask": "low_conf"},
    "steps above the code length": {"steps": LEVELS + 1},
    "decoder of another paradigm": {"decoder": "greedy"},
    "negative seed": {"seed": -1},
    "beam too wide": {"beam": 257},
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_s3_bad_values_are_422_with_the_reason(tmp_path, case):
    app, _ = make(tmp_path)
    content = json.dumps({"query": "cats", **BAD[case]})
    answer = ask(app, "POST", "/search", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["code"] in ("invalid_request", "bad_search") and len(error["message"]) > 10


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_s3_nan_and_infinity_are_422(tmp_path, number):
    app, _ = make(tmp_path)
    content = f'{{"query": "cats", "threshold": {number}}}'
    answer = ask(app, "POST", "/search", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and "threshold" in answer.json()["error"]["message"]


def test_s3_text_that_is_not_json_is_422_in_the_one_shape(tmp_path):
    app, _ = make(tmp_path)
    answer = ask(app, "POST", "/search", content="{", headers={"content-type": "application/json"})
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "invalid_request"


def test_s1_key_is_asked_for_on_every_route_but_health(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBULA_API_KEY", KEY)
    app, _ = make(tmp_path, key_required=True)
    routes = [("GET", r.path) for r in app.routes if r.path != "/healthz"] + [("POST", "/search"), ("POST", "/trace")]
    routes += [
        ("POST", "/retrieve"),
        ("POST", "/documents"),
        ("POST", "/documents/remove"),
        ("GET", "/console/"),
        ("GET", "/nothing"),
        ("GET", "/reports/healthz"),
    ]
    for method, path in routes:
        assert ask(app, method, path).status_code == 401, path
        wrong = ask(app, method, path, headers={"authorization": "Bearer wrong-wrong-wrong-wrong"})
        assert wrong.status_code == 401 and wrong.headers["www-authenticate"], path
    assert ask(app, "GET", "/healthz").status_code == 200
    good = {"authorization": f"Bearer {KEY}"}
    assert ask(app, "POST", "/search", json={"query": "cats"}, headers=good).status_code == 200
    assert ask(app, "GET", "/retrievers", auth=("anyone", KEY)).status_code == 200


def test_s1_app_without_its_key_does_not_start(tmp_path, monkeypatch):
    monkeypatch.delenv("MOBULA_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="MOBULA_API_KEY"):
        make(tmp_path, key_required=True)


def test_s1_key_file_must_be_private_and_keys_long(tmp_path, monkeypatch):
    monkeypatch.delenv("MOBULA_API_KEY", raising=False)
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\nanother-secret-key-for-b\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        make(tmp_path, key_required=True, key_file=path)
    path.chmod(0o600)
    app, _ = make(tmp_path, key_required=True, key_file=path)
    for key in (KEY, "another-secret-key-for-b"):
        assert ask(app, "GET", "/retrievers", headers={"authorization": f"Bearer {key}"}).status_code == 200
    path.write_text("short")
    with pytest.raises(ConfigError, match="16 characters"):
        make(tmp_path, key_required=True, key_file=path)


def test_s10_key_is_neither_logged_nor_shown(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("MOBULA_API_KEY", KEY)
    app, _ = make(tmp_path, key_required=True)
    wrong = "Bearer wrong-key-wrong-key-wrong"
    with caplog.at_level(logging.DEBUG):
        good = {"authorization": f"Bearer {KEY}"}
        answers = [ask(app, "POST", "/search", json={"query": "boom"}, headers=good)]
        answers.append(ask(app, "GET", "/retrievers", headers={"authorization": wrong}))
    seen = caplog.text + "".join(capfd.readouterr()) + "".join(a.text for a in answers) + repr(app.user_middleware)
    assert KEY not in seen and "wrong-key" not in seen


def test_exception_is_a_500_without_its_text(tmp_path, caplog):
    app, _ = make(tmp_path)
    answer = ask(app, "POST", "/search", json={"query": "boom"})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert "secret detail" not in answer.text and "Traceback" not in answer.text
    assert error["message"].split()[-1] in caplog.text


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_s2_large_body_is_413(tmp_path, chunked):
    app, _ = make(tmp_path, max_body_bytes=2048)
    sent = 0

    async def chunks():
        nonlocal sent
        for _ in range(10_000):
            sent += 1024
            yield b"x" * 1024

    content = chunks() if chunked else b"x" * 10_000_000
    answer = ask(app, "POST", "/search", content=content)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_s2_no_more_than_the_limit_is_read():
    from mobula.serving.limits import Guard, Limits

    read = 0

    async def receive():
        nonlocal read
        read += 1024
        return {"type": "http.request", "body": b"x" * 1024, "more_body": True}

    async def send(message):
        pass

    async def never(*_):
        raise AssertionError("the request must not reach the app")

    scope = {"type": "http", "path": "/search", "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1)}
    asyncio.run(Guard(never, Limits(max_body_bytes=4096))(scope, receive, send))
    assert read == 5 * 1024


def test_s2_content_length_that_lies_is_counted(tmp_path):
    app, _ = make(tmp_path, max_body_bytes=2048)
    answer = ask(app, "POST", "/search", content=b"x" * 5000, headers={"content-length": "10"})
    assert answer.status_code == 413


def test_s4_each_client_has_its_own_bucket(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text("key-of-the-first-client\nkey-of-the-second-client")
    monkeypatch.delenv("MOBULA_API_KEY", raising=False)
    app, _ = make(tmp_path, key_required=True, key_file=path, requests_per_s=0.5, burst=3)
    first, second = ({"authorization": f"Bearer key-of-the-{n}-client"} for n in ("first", "second"))

    async def calls():
        async with client(app) as http:
            got = [await http.get("/retrievers", headers=first) for _ in range(4)]
            return got, await http.get("/retrievers", headers=second), await http.get("/healthz")

    got, other, health = asyncio.run(calls())
    assert [a.status_code for a in got] == [200, 200, 200, 429]
    assert 1 <= int(got[3].headers["retry-after"]) <= 2
    assert other.status_code == 200 and health.status_code == 200


def test_s4_bucket_refills_and_forgets_old_clients():
    from mobula.serving.errors import RequestRefused
    from mobula.serving.limits import CLIENTS, Buckets

    now = 0.0
    buckets = Buckets(2.0, 1, lambda: now)
    buckets.take("a")
    with pytest.raises(RequestRefused):
        buckets.take("a")
    now = 0.5
    buckets.take("a")
    for i in range(CLIENTS + 5):
        buckets.take(str(i))
    assert len(buckets.levels) == CLIENTS


def test_s5_request_over_its_time_is_408_and_the_work_stops(tmp_path):
    beats = tmp_path / "beats"
    app, _ = make(tmp_path, Toy(step_s=0.1, heartbeat=beats), time_limit_s=0.25)

    async def run():
        async with client(app) as http:
            answer = await http.post("/search", json={"query": "cats", "steps": 16, "remask": "low_conf"})
            size = beats.stat().st_size
            await asyncio.sleep(0.5)
            return answer, size

    answer, size = asyncio.run(run())
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "timeout"
    assert size <= 4 and beats.stat().st_size <= size + 1


def test_s5_trace_over_its_time_ends_with_an_error_and_the_work_stops(tmp_path):
    beats = tmp_path / "beats"
    app, _ = make(tmp_path, Toy(step_s=0.1, heartbeat=beats), time_limit_s=0.35)

    async def run():
        async with client(app) as http:
            answer = await http.post("/trace", json={"query": "cats", "steps": 16, "remask": "low_conf"})
            await asyncio.sleep(0.3)
            return answer

    events = parse_events(asyncio.run(run()).text)
    assert [name for name, _ in events][:2] == ["step", "step"] and events[-1][1]["error"]["code"] == "timeout"
    assert beats.stat().st_size <= 5


def parse_events(text):
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in text.strip().split("\n\n")]
    return [(b["event"], json.loads(b["data"])) for b in blocks]


@pytest.mark.parametrize("path", ["/trace", "/search"])
def test_trace_streams_every_step_and_then_the_result_of_search(tmp_path, path):
    app, _ = make(tmp_path)
    request = {"query": "warm seas", "steps": 3}
    answer = ask(app, "POST", path, json={**request, "trace": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = parse_events(answer.text)
    assert [name for name, _ in events] == ["step"] * 3 + ["result"]
    assert events[1][1] == {"step": 2, "commits": [[1, 2, 0.5]], "remasked": [], "valid_left": 2}
    plain = ask(app, "POST", "/search", json=request).json()
    assert events[-1][1]["hits"] == plain["hits"]


def test_trace_of_a_retriever_without_steps_is_refused(tmp_path):
    app, _ = make(tmp_path)
    answer = ask(app, "POST", "/trace", json={"query": "cats", "retriever": "twin"})
    assert answer.status_code == 422 and "words" in answer.json()["error"]["message"]


def test_pages_of_other_sites_and_foreign_names_are_refused(tmp_path):
    app, _ = make(tmp_path)
    foreign = ask(app, "GET", "/retrievers", headers={"origin": "https://evil.example"})
    rebound = ask(app, "GET", "/retrievers", headers={"host": "evil.example"})
    assert (foreign.status_code, rebound.status_code) == (403, 403)
    assert ask(app, "GET", "/retrievers", headers={"origin": "http://localhost"}).status_code == 200


def write_report(root, name):
    (root / name).mkdir(parents=True)
    report = {"method": "toy", "experiment": name, "claims": [{"verdict": "holds"}], "measures": {}}
    (root / name / "report.json").write_text(json.dumps(report))
    (root / name / "curve.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")


def test_reports_and_plots_can_be_read(tmp_path):
    write_report(tmp_path / "runs", "one")
    app, _ = make(tmp_path, reports=tmp_path / "runs")
    (row,) = ask(app, "GET", "/reports").json()
    assert row["name"] == "one" and row["verdicts"] == {"holds": 1, "does_not_hold": 0, "undecided": 0}
    assert ask(app, "GET", "/reports/one").json()["plot_files"] == ["curve.svg"]
    plot = ask(app, "GET", "/reports/one/plots/curve.svg")
    assert plot.headers["content-type"].startswith("image/svg") and "script-src 'self'" in str(plot.headers)


HOSTILE = [
    "..", "../secret", "%2e%2e", "%2e%2e%2fsecret", "..%2fsecret", "....//secret", "/etc", "%2fetc", "//etc/passwd",
    "file:%2f%2f%2fetc%2fpasswd", "s3:%2f%2fbucket%2fkey", "secret%00", "%00", "link", ".hidden",
    "one%2f..%2f..%2fsecret", "one\\..\\secret", "~root", "x" * 65, "one%0a",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_s6_names_of_reports_never_leave_their_directory(tmp_path, name):
    root = tmp_path / "runs"
    write_report(root, "one")
    write_report(root, ".hidden")
    write_report(tmp_path, "secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "one" / "link.svg").symlink_to(tmp_path / "secret" / "report.json")
    app, _ = make(tmp_path, reports=root)
    for path in (f"/reports/{name}", f"/reports/{name}/plots/curve.svg", f"/reports/one/plots/{name}"):
        answer = ask(app, "GET", path)
        # A client may resolve ".." itself and then ask for another, harmless page.
        assert answer.status_code in (200, 307, 404), path
        assert not any(leak in answer.text for leak in ('"experiment":"secret"', '"experiment":".hidden"', "root:")), (
            path
        )
    assert ask(app, "GET", "/reports/one/plots/link.svg").status_code == 404
    assert ask(app, "GET", f"/console/{name}").status_code in (200, 307, 404)
    assert [r["name"] for r in ask(app, "GET", "/reports").json()] == ["one"]


@pytest.mark.parametrize("path", ["../x", "a/../b", "file:///x", "s3://b/x", "a\0b", "", " "])
def test_s6_path_arguments_are_plain_local_paths(tmp_path, path):
    for name in ("artifact", "reports", "added", "key_file"):
        with pytest.raises(ValueError, match="plain local path"):
            RetrieverArgs(**{"artifact": tmp_path, name: path})


def test_console_and_pages_load_nothing_from_elsewhere(tmp_path):
    app, _ = make(tmp_path)
    page = ask(app, "GET", "/console/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert ask(app, "GET", "/").headers["location"] == "console/"


def test_openapi_names_every_limit(tmp_path):
    app, _ = make(tmp_path)
    schema = ask(app, "GET", "/openapi.json").json()["components"]["schemas"]["SearchRequest"]
    assert schema["properties"]["query"]["maxLength"] == 2000 and schema["additionalProperties"] is False
