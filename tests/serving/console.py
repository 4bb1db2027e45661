"""Drives the console in headless Chromium.

``python -m tests.serving.console http://127.0.0.1:8000 "a query" docs/images/console.png`` takes the screenshot of a
running endpoint that the documentation shows.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, expect, sync_playwright

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def chromium() -> str | None:
    """The browser's path, or None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of an application behind uvicorn."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    """A browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


def open_console(
    browser: Browser, url: str, width: int = 1280, dark: bool = False, path: str = ""
) -> tuple[Page, list[str]]:
    """The console on a fresh page, and a list that collects everything that goes wrong on it."""
    page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme="dark" if dark else "light")
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith(url) else problems.append(f"asked {r.url}"))
    page.goto(f"{url}/console/{path}")
    expect(page.locator("body")).to_have_attribute("data-ready", "yes")
    return page, problems


def set_slider(page: Page, steps: int) -> None:
    """Move the budget slider with the keyboard, as a person without a mouse does."""
    slider = page.locator("#steps")
    slider.focus()
    slider.press("Home")
    for _ in range(steps):
        slider.press("ArrowRight")


def search(page: Page, query: str, steps: int) -> None:
    """Search and wait until the trace and the results are there."""
    set_slider(page, steps)
    ask(page, query)


def ask(page: Page, query: str) -> None:
    """Search with the options as they are."""
    page.get_by_label("Query").fill(query)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#cost")).to_contain_text("network call")
    expect(page.locator("#form .primary")).to_be_enabled()


if __name__ == "__main__":
    address, text, path = sys.argv[1:]
    with launched() as chromium_browser:
        shown, _ = open_console(chromium_browser, address.rstrip("/"))
        search(shown, text, 4)
        shown.screenshot(path=path)
