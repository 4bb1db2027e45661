"""The console in a real browser, over the toy retriever behind uvicorn."""

import json
import socket
import threading
import time

import pytest
import uvicorn
from playwright.sync_api import expect

from serve_apps.retriever import Corpus, RetrieverArgs, State, create_app
from tests.serving import console
from tests.serving.toy import LEVELS, Toy

pytestmark = pytest.mark.skipif(
    console.chromium() is None, reason="no chromium on this machine (apt-get install chromium)"
)

PLOT = '<svg xmlns="http://www.w3.org/2000/svg" width="80" height="40"><rect width="80" height="40"/></svg>'
REPORT = {
    "method": "toy",
    "experiment": "<b>sharks</b>",
    "seed": 0,
    "notes": ["One note."],
    "data": [{"name": "sea", "source": "generated", "sha256": "0", "records": 4}],
    "measures": {"hit@10": {"value": 0.8123, "low": 0.75, "high": 0.87, "n": 200}},
    "claims": [
        {"name": "A", "statement": "more helps", "effect": 0.01, "low": -0.02, "high": 0.04, "verdict": "undecided"},
        {"name": "B", "statement": "codes matter", "effect": 0.4, "low": 0.3, "high": 0.5, "verdict": "holds"},
        {"name": "C", "statement": "faster", "effect": -1, "low": -2, "high": -0.1, "verdict": "does_not_hold"},
    ],
    "tables": {"Budgets": [["steps", "hit@1"], [1, 0.5], [2, 0.52]]},
    "cost": {"wall_s": 12.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    root = tmp_path_factory.mktemp("console")
    run = root / "runs" / "sharks"
    run.mkdir(parents=True)
    (run / "report.json").write_text(json.dumps(REPORT))
    (run / "curve.svg").write_text(PLOT)
    args = RetrieverArgs(artifact=root, reports=root / "runs", key_required=False, calibration_s=10)
    app = create_app(State(Corpus(Toy(), "0" * 16, args)), args)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with console.launched() as launched:
        yield launched


def test_search_shows_each_denoising_step_and_the_hits(browser, url, tmp_path):
    page, problems = console.open_console(browser, url)
    console.search(page, "warm seas", LEVELS)
    rows = page.locator("#code tbody tr")
    expect(rows).to_have_count(2 + LEVELS)
    expect(rows.nth(1).locator(".masked")).to_have_count(LEVELS)
    expect(rows.nth(3).locator(".new")).to_have_text("2")
    expect(rows.nth(3).locator(".masked")).to_have_count(LEVELS - 2)
    expect(page.locator("#progress")).to_contain_text("docid 1-2-3-4")
    expect(page.locator("#results h3").first).to_have_text("Rays")
    page.screenshot(path=tmp_path / "search.png", full_page=True)
    assert problems == []


def test_slider_sets_the_budget_and_says_what_it_costs(browser, url):
    page, problems = console.open_console(browser, url)
    expect(page.locator("#budget-shown")).to_contain_text("the default")
    console.search(page, "cats", 1)
    expect(page.locator("#budget-shown")).to_have_text("1 step")
    expect(page.locator("#latency")).to_contain_text("ms on this host")
    expect(page.locator("#code tbody tr")).to_have_count(3)
    page.get_by_label("Decoder").select_option("one_pass")
    expect(page.locator("#steps")).to_be_disabled()
    assert problems == []


def test_retrievers_side_by_side(browser, url):
    page, problems = console.open_console(browser, url)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Query").fill("dogs")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#columns section")).to_have_count(2)
    expect(page.locator("#columns h3").first).to_have_text("Dogs")
    assert problems == []


def test_reports_show_measures_claims_tables_and_plots(browser, url, tmp_path):
    page, problems = console.open_console(browser, url)
    page.get_by_role("tab", name="Search").focus()
    page.keyboard.press("ArrowLeft")
    report = page.locator("#report")
    expect(report).to_contain_text("<b>sharks</b>")
    expect(report).to_contain_text("0.75 to 0.87")
    assert [c.inner_text() for c in report.locator(".holds, .does_not_hold, .undecided").all()] == [
        "undecided", "holds", "does not hold",
    ]  # fmt: skip
    image = report.locator("img")
    image.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('#report img').naturalWidth > 0")
    page.screenshot(path=tmp_path / "reports.png", full_page=True)
    assert problems == []


def test_refusals_are_shown_in_words(browser, url):
    page, _ = console.open_console(browser, url)
    page.get_by_label("Remask").select_option("low_conf")
    console.set_slider(page, 4 * LEVELS)
    page.get_by_label("Remask").select_option("none")
    page.get_by_label("Query").fill("   ")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("blank")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_narrow_screens_do_not_scroll_sideways(browser, url, tmp_path, dark):
    page, problems = console.open_console(browser, url, width=400, dark=dark)
    console.search(page, "warm seas", LEVELS)
    for tab in ("Search", "Compare", "Reports"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, tab
    page.get_by_role("tab", name="Search").click()
    page.screenshot(path=tmp_path / "narrow.png", full_page=True)
    assert problems == []


def test_api_page_lists_every_route(browser, url):
    page, problems = console.open_console(browser, url)
    page.get_by_role("link", name="API").click()
    expect(page.locator(".route")).to_have_count(8)
    expect(page.locator(".route", has_text="POST /search").first).to_contain_text("characters at most 2000")
    assert problems == []
