"""Fixtures of the web pages' tests: Chromium, and pages in which nothing may go wrong unseen.

They end with each file: playwright keeps an event loop running, which later tests must not find.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from cluster.config import parse_config
from cluster.inline import InlineCluster
from tests.serving import served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 120_000
PREFIX = "/behind/a/proxy"


@pytest.fixture(scope="module")
def inline_url() -> Iterator[str]:
    """The default model in this process, ready; below PREFIX too. Gives the base URL."""
    with InlineCluster(parse_config({})) as cluster:
        app = cluster.ingress.http_app()
        with served(Starlette(routes=[Mount(PREFIX, app), Mount("/", app)])) as url:
            yield url
            cluster.ingress.loads.close()  # watches have no end of their own


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    sync_api.expect.set_options(timeout=TIMEOUT_MS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def problems() -> list[str]:
    """What went wrong in `page`; a test that expects something takes it out."""
    return []


@pytest.fixture
def page(browser: Browser, problems: list[str]) -> Iterator[Page]:
    """An empty page. Errors and warnings of its console, what its policy refuses, uncaught errors
    and requests to other hosts fail the test."""

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def on_request(request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme in ("http", "https") and url.hostname != "127.0.0.1":
            problems.append(f"request to {request.url}")

    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(str(error)))
    context.on("request", on_request)
    yield page
    context.close()
    assert problems == []
