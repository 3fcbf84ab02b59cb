"""Take the pictures of the web pages in docs/images from a running server.

    shoal serve --experts 3 --attention 2 --enable-chaos
    python tools/take_screenshots.py

Talks to the server meanwhile, so that there is something to see; kills an expert worker for one of
the pictures where the server allows it. Needs Chromium.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
SIZE = {"width": 1280, "height": 800}
QUESTION = "Tell me a story about a brave fox named Pip."
PROMPTS = (
    QUESTION,
    "What is 37 + 45?",
    "Write a Python function that adds 7 to a number.",
    'How do you say "the red house" in French?',
    "What is the capital of Japan?",
    "Tom has a red ball. Mia has a blue kite. Who has the kite?",
)
LINES_S = 45
"""How long to wait until the time lines have something to show."""


def talk(url: str, key: str, prompts: Iterator[str], stop: threading.Event) -> None:
    """Ask one question after the other."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
        while not stop.is_set():
            messages = [{"role": "user", "content": next(prompts)}]
            client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 200})


@contextmanager
def talking(url: str, key: str, threads: int = 3) -> Iterator[None]:
    """Several who talk at the same time."""
    stop = threading.Event()
    prompts = [itertools.islice(itertools.cycle(PROMPTS), i, None) for i in range(threads)]
    talkers = [threading.Thread(target=talk, args=(url, key, own, stop)) for own in prompts]
    for talker in talkers:
        talker.start()
    try:
        yield
    finally:
        stop.set()
        for talker in talkers:
            talker.join()


class Camera:
    """A browser that looks at one server and keeps what it sees."""

    def __init__(self, browser: Browser, url: str, key: str, folder: Path) -> None:
        self._browser, self._url, self._key, self._folder = browser, url, key, folder

    @contextmanager
    def page(self, path: str, scheme: Literal["light", "dark"] = "light") -> Iterator[Page]:
        """A page of the server."""
        context = self._browser.new_context(
            viewport=SIZE, color_scheme=scheme, device_scale_factor=1.5, reduced_motion="reduce"
        )
        with context:
            page = context.new_page()
            page.add_init_script(f"sessionStorage.setItem('shoal.key', {self._key!r})")
            page.goto(self._url + path)
            yield page

    def keep(self, page: Page, name: str, *, whole: bool = False) -> None:
        """Write a picture of what the page shows; `whole`: also what one would scroll to."""
        page.screenshot(path=self._folder / f"{name}.png", full_page=whole)
        print(self._folder / f"{name}.png")


def shoot_chat(camera: Camera) -> None:
    """A question and its answer."""
    with camera.page("/") as page:
        page.get_by_label("Message", exact=True).fill(QUESTION)
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        expect(page.get_by_role("button", name="Stop")).to_be_hidden(timeout=120_000)
        camera.keep(page, "chat")


def shoot_experts(camera: Camera) -> None:
    """The map by rows/s, light and dark, and by worker when one has died."""
    with camera.page("/experts", "dark") as dark, camera.page("/experts") as page:
        page.wait_for_timeout(1000 * LINES_S)
        camera.keep(dark, "experts-dark", whole=True)
        camera.keep(page, "experts", whole=True)
        page.get_by_text("Worker", exact=True).first.click()
        kill = page.get_by_role("button", name="Kill").first
        if kill.is_visible():
            kill.click()
            page.get_by_role("dialog").get_by_role("button", name="Kill").click()
            expect(page.locator("tr.joined")).to_be_visible(timeout=90_000)
            camera.keep(page, "experts-killed", whole=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Take the pictures in docs/images.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--folder", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    key = os.environ.get("SHOAL_API_KEY", "")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        camera = Camera(browser, arguments.url, key, arguments.folder)
        shoot_chat(camera)
        with talking(arguments.url, key):
            shoot_experts(camera)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
