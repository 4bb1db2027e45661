"""The console in a real browser, over a small trained DiffuGR behind uvicorn."""

import json
import re

import httpx
import pytest
from playwright.sync_api import expect

from serve_apps.retriever import Corpus, RetrieverArgs, State, create_app
from tests import tiny
from tests.serving import console

LEVELS = tiny.CONFIG["docid"]["levels"]
QUERY = "find a restaurant that is open tonight"

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
def url(tmp_path_factory, trained_artifact):
    root = tmp_path_factory.mktemp("console")
    run = root / "runs" / "sharks"
    run.mkdir(parents=True)
    (run / "report.json").write_text(json.dumps(REPORT))
    (run / "curve.svg").write_text(PLOT)
    folders = {"reports": root / "runs", "added": root / "added"}
    args = RetrieverArgs(artifact=trained_artifact, key_required=False, calibration_s=60, **folders)
    app = create_app(State(Corpus.load(args)), args)
    with console.served(app) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with console.launched() as launched:
        yield launched


def test_search_shows_each_denoising_step_and_the_hits_of_the_api(browser, url, tmp_path):
    page, problems = console.open_console(browser, url)
    console.search(page, QUERY, LEVELS)
    answer = httpx.post(f"{url}/search", json={"query": QUERY, "steps": LEVELS}, timeout=60).json()
    steps = page.locator("#code tbody tr").all()[2:]
    assert len(steps) == answer["steps_used"]
    assert page.locator("#code tbody tr").nth(1).locator(".masked").count() == LEVELS
    masked = [row.locator(".masked").count() for row in steps]
    assert masked == sorted(masked, reverse=True) and masked[-1] == 0
    assert all(row.locator(".new").count() for row in steps)
    docid = [cell.inner_text() for cell in steps[-1].locator("td:not(.left)").all()]
    assert docid == [str(token) for token in answer["raw_code"]]
    expect(page.locator("#progress")).to_contain_text(f"docid {'-'.join(docid)}")
    assert page.locator("#results h3").all_inner_texts() == [hit["title"] for hit in answer["hits"]]
    shown = page.locator("#results li").first.locator(".token").all_inner_texts()
    assert shown == [str(token) for token in answer["hits"][0]["code"]]
    page.screenshot(path=tmp_path / "search.png", full_page=True)
    assert problems == []


def test_slider_sets_the_budget_and_says_what_it_costs(browser, url):
    page, problems = console.open_console(browser, url)
    expect(page.locator("#budget-shown")).to_contain_text("the default")
    console.search(page, QUERY, 1)
    expect(page.locator("#budget-shown")).to_have_text("1 step")
    expect(page.locator("#cost")).to_contain_text("1 network call, 1 of 1 steps, ordered by one_pass")
    expect(page.locator("#latency")).to_have_text(re.compile(r"at most [\d.]+ ms on this host"))
    expect(page.locator("#code tbody tr")).to_have_count(3)
    page.get_by_label("Decoder").select_option("one_pass")
    expect(page.locator("#steps")).to_be_disabled()
    assert problems == []


def test_retriever_offers_its_own_decoders(browser, url):
    page, problems = console.open_console(browser, url)
    page.get_by_label("Retriever").select_option("autoregressive/rq")
    assert page.locator("#decoder option").all_inner_texts() == ["beam", "greedy", "exhaustive"]
    console.ask(page, QUERY)
    expect(page.locator("#cost")).to_contain_text("ordered by log_likelihood")
    expect(page.locator("#denoising")).to_be_hidden()
    page.get_by_label("Retriever").select_option("bm25")
    expect(page.locator("#decoder")).to_be_disabled()
    assert problems == []


def test_retrievers_side_by_side(browser, url):
    page, problems = console.open_console(browser, url)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Query").fill(QUERY)
    page.get_by_role("button", name="Search", exact=True).click()
    columns = page.locator("#columns section")
    expect(columns).to_have_count(4)
    heads = [text.splitlines()[0] for text in columns.locator("h2").all_inner_texts()]
    assert heads == ["diffusion/rq", "autoregressive/rq", "bm25", "dense"]
    assert [column.locator("li").count() for column in columns.all()] == [10] * 4
    assert page.locator("#columns .shared").count() > 1
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


def test_document_is_added_found_and_removed(browser, url):
    page, problems = console.open_console(browser, url)
    state = page.locator("#state")
    expect(state).to_have_text("Version 0 of the corpus, 150 documents")
    page.get_by_text("Add a document").click()
    page.get_by_label("Id", exact=True).fill("count_manta_rays")
    page.get_by_label("Text", exact=True).fill("Counts <b>manta rays</b> in a photograph.")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(state).to_have_text(
        re.compile(r"Version 1 of the corpus, 151 documents; count_manta_rays was added with docid [\d-]+")
    )
    page.get_by_label("Retriever").select_option("bm25")
    console.ask(page, "manta rays in a photograph")
    first = page.locator("#results li").first
    expect(first.locator("h3")).to_have_text("count_manta_rays")
    expect(first.locator("p")).to_have_text("Counts <b>manta rays</b> in a photograph.")
    page.on("dialog", lambda dialog: dialog.accept())
    first.get_by_role("button", name="Remove count_manta_rays").click()
    expect(state).to_have_text("Version 2 of the corpus, 150 documents; count_manta_rays was removed")
    expect(page.locator("#results li")).to_have_count(9)
    console.ask(page, "manta rays in a photograph")
    expect(page.locator("#results h3").first).not_to_have_text("count_manta_rays")
    assert problems == []


def test_changes_of_others_are_noticed_and_refusals_shown(browser, url):
    page, _ = console.open_console(browser, url)
    new = {"documents": [{"id": "squid", "text": "counts squids"}]}
    version = httpx.post(f"{url}/documents", json=new, timeout=60).json()["version"]
    console.ask(page, QUERY)
    expect(page.locator("#state")).to_have_text(f"Version {version} of the corpus, 151 documents")
    page.get_by_text("Add a document").click()
    page.get_by_label("Id", exact=True).fill("squid")
    page.get_by_label("Text", exact=True).fill("again")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("'squid' exists already")
    httpx.post(f"{url}/documents/remove", json={"ids": ["squid"]}, timeout=60).raise_for_status()


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
    console.search(page, QUERY, LEVELS)
    for tab in ("Search", "Compare", "Reports"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, tab
    page.get_by_role("tab", name="Search").click()
    page.screenshot(path=tmp_path / "narrow.png", full_page=True)
    assert problems == []


def test_api_page_lists_every_route(browser, url):
    page, problems = console.open_console(browser, url)
    page.get_by_role("link", name="API").click()
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    expect(page.locator(".route")).to_have_count(sum(len(operations) for operations in paths.values()))
    expect(page.locator(".route", has_text="POST /search").first).to_contain_text("characters at most 2000")
    assert problems == []
