"""The console's chat page in a real browser: what the models do, as it streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from mobula.agents.worlds import Task
from serve_apps import agent, rag
from serve_apps.agent_schema import AgentArgs
from serve_apps.agent_solving import State
from serve_apps.rag_answering import State as RagState
from serve_apps.rag_schema import RagArgs
from tests.agents.moat import small
from tests.serving import console

pytestmark = pytest.mark.skipif(
    console.chromium() is None, reason="no chromium on this machine (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def url(agent_artifact: Path) -> Iterator[str]:
    args = AgentArgs(artifact=agent_artifact, key_required=False)
    state = State(args)
    with console.served(agent.create_app(state, args)) as address:
        yield address
    state.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with console.launched() as launched:
        yield launched


@pytest.fixture(scope="module")
def task() -> Task:
    """A task of the shop, with several calls."""
    return next(task for task in small.known_tasks() if task.family == "shop")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False)])
def test_a_reply_shows_its_plan_its_tools_and_its_answer(
    browser: Browser, url: str, task: Task, width: int, dark: bool, tmp_path: Path
) -> None:
    page, problems = console.open_console(browser, url, width=width, dark=dark, path="chat.html")
    assert page.locator("#model option").all_inner_texts() == ["agent/arith", "agent/kb", "agent/shop"]
    page.get_by_label("Model").select_option("agent/shop")
    page.get_by_label("Message").fill(task.text)
    page.get_by_role("button", name="Send").click()
    reply = page.locator(".reply")
    expect(reply.locator(".outcome")).to_have_text(task.answer)
    expect(page.locator(".asked")).to_have_text(task.text)
    expect(reply.locator(".plan li")).to_have_count(len(str(task.gold_plan).splitlines()))
    calls = reply.locator(".calls > li")
    statements = [line.partition(" = ")[2] or line for line in str(task.gold_actions).splitlines()]
    assert [row.locator("code").inner_text() for row in calls.all()] == statements
    expect(calls.last.locator("div")).to_have_text(task.answer)
    expect(reply.locator(".hint")).to_contain_text("tokens read")
    page.get_by_label("Message").fill("shelves and ships")
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".reply")).to_have_count(2)
    expect(page.locator("#log")).not_to_have_attribute("aria-busy", "true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / "chat.png", full_page=True)
    print(tmp_path / "chat.png")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".reply")).to_have_count(0)
    assert problems == []


def test_lists_that_tools_return_are_tables(browser: Browser, rag_artifact: Path, tmp_path: Path) -> None:
    args = RagArgs(artifact=rag_artifact, key_required=False)
    app = rag.create_app(RagState.load(args), args)
    with console.served(app) as url:
        page, problems = console.open_console(browser, url, path="rag.html")
        page.get_by_role("link", name="Chat").click()
        page.get_by_label("Message").fill("where was Arlo born")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".calls summary")).to_have_text(["6 results", "2 results"])
        page.locator(".calls summary").last.click()
        expect(page.locator(".reply details[open] tbody tr")).to_have_count(2)
        expect(page.locator(".reply details[open] thead")).to_contain_text("probability")
        page.screenshot(path=tmp_path / "rag.png", full_page=True)
        print(tmp_path / "rag.png")
    assert problems == []


def test_refusals_are_shown_and_leave_the_conversation_as_it_was(browser: Browser, url: str, task: Task) -> None:
    page, problems = console.open_console(browser, url, path="chat.html")
    page.get_by_label("Message").fill("   ")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("blank")
    assert len(problems) == 1 and "422" in problems[0]
    page.get_by_label("Model").select_option("agent/shop")
    page.get_by_label("Message").fill(task.text)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".reply").last.locator(".outcome")).to_have_text(task.answer)
    expect(page.get_by_role("alert")).to_be_hidden()
