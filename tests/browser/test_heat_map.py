"""The page /experts: a heat map that follows the load, workers that come and go."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import statistics
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.browser.conftest import PREFIX
from tests.browser.heat_map_data import STREAM, Json, load_of, status_of, statuses, stream
from tests.chaos.deployment import deployed

if TYPE_CHECKING:
    from playwright.sync_api import Page, Request, Route

pytestmark = pytest.mark.browser

LAYERS, NUM_EXPERTS = [1, 2, 3], 32  # of the default model
FRENCH = ['How do you say "the red house" in French?', 'What does "une pomme" mean?']
SUMS = ["What is 37 + 45?", "What is 62 - 17?", "What is 21 + 48?"]
# The busiest of layer 3: docs/default-model-experts.png
FRENCH_EXPERTS, SUMS_EXPERTS = [18, 22, 27, 30], [0, 13, 21]
FRAME_MS = 1000 / 60
SETTINGS: Json = {
    "enable_chaos": True,
    # 48 experts, each on both workers
    "experts": {"num_workers": 2, "redundancy": 48, "rebalance": {"enabled": False}},
    "router": {"num_workers": 1},
    "attention": {"num_workers": 1},
}


# ---- helpers


def ask(url: str, prompt: str) -> None:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        json.load(response)


@contextmanager
def asking(url: str, prompts: Sequence[str]) -> Iterator[None]:
    """One question after the other meanwhile."""
    stop = threading.Event()

    def run() -> None:
        for prompt in itertools.cycle(prompts):
            if stop.is_set():
                return
            ask(url, prompt)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def open_map(page: Page, url: str) -> None:
    """The page with numbers on its map."""
    page.emulate_media(reduced_motion="reduce")  # colours do not ease over to the next ones
    page.goto(url + "/experts")
    until(page, "window.shoalExperts?.load")


def until(page: Page, condition: str, timeout_ms: float | None = None) -> None:
    """Wait for a condition; as a function, because the page's policy lets nobody evaluate text."""
    page.wait_for_function(f"() => {condition}", timeout=timeout_ms)


def pixels(page: Page) -> list[tuple[int, ...]]:
    """Colour of every cell on the canvas, at a quarter of its width: (red, green, blue, alpha)."""
    found = page.evaluate("""async () => {
        for (let i = 0; i < 2; i += 1) await new Promise(requestAnimationFrame); // it is painted
        const map = document.getElementById("map");
        const copy = new OffscreenCanvas(map.width, map.height);
        const context = copy.getContext("2d", { willReadFrequently: true });
        context.drawImage(map, 0, 0);
        return shoalExperts.load.holders.map((_, cell) => {
            const { x, y, width, height } = shoalExperts.map.picture.boxOf(cell);
            return Array.from(context.getImageData(x + width / 4, y + height / 2, 1, 1).data);
        });
    }""")
    return [tuple(colour) for colour in found]


def luminance(colour: tuple[int, ...]) -> float:
    red, green, blue, _ = colour
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def told(page: Page) -> str:
    """What Chromium tells assistive technology that the focus is on."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    [cell] = [node for node in nodes if node["role"]["value"] == "gridcell"]
    session.detach()
    return str(cell["name"]["value"])


def point_at(page: Page, cell: int) -> None:
    """Move the pointer onto a cell."""
    box = page.evaluate("cell => shoalExperts.map.picture.boxOf(cell)", cell)
    middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    page.locator("#map").hover(position=middle)


def wait_for_events(page: Page, *texts: str) -> None:
    """Until the list of events has lines that contain these."""
    for text in texts:
        page.locator("#events li", has_text=text).first.wait_for()


# ---- of the default model


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_cell_for_every_expert_of_every_layer(page: Page, inline_url: str, prefix: str) -> None:
    open_map(page, inline_url + prefix)
    assert page.evaluate("Array.from(shoalExperts.load.layers)") == LAYERS
    grid = page.get_by_role("grid", name="Load of every expert")
    assert grid.get_attribute("aria-rowcount") == "3"
    assert grid.get_attribute("aria-colcount") == "32"
    painted = pixels(page)
    assert len(painted) == 96 and {alpha for *_, alpha in painted} == {255}
    page.locator("#workers tr", has_text="experts-0").wait_for()
    assert page.get_by_role("button", name="Kill").count() == 0  # chaos is not served
    page.get_by_text("The map as a table").click()
    page.locator("#table tbody tr").first.wait_for()
    assert page.locator("#table tbody tr").count() == NUM_EXPERTS
    held = page.locator("#table tbody tr td:nth-child(5)").all_inner_texts()
    assert {name for text in held for name in text.split(", ")} == {"experts-0", "experts-1"}


def test_dark_and_light(page: Page, inline_url: str) -> None:
    page.emulate_media(color_scheme="dark")
    open_map(page, inline_url)
    until(page, "shoalExperts.load.rates.every((rate) => rate === 0)")  # nobody asks
    assert all(luminance(colour) < 60 for colour in pixels(page))
    page.get_by_role("button", name="Switch between light and dark").click()
    assert all(luminance(colour) > 200 for colour in pixels(page))


def test_map_follows_the_domain_of_the_load(page: Page, inline_url: str) -> None:
    open_map(page, inline_url)
    leads = """([ahead, behind]) => {
        const of = (experts) => experts.reduce((sum, e) => sum + shoalExperts.load.rates[64 + e], 0)
        const rates = shoalExperts.load.rates.slice(64);
        return of(ahead) / ahead.length > 3 * of(behind) / behind.length
            && ahead.includes(rates.indexOf(Math.max(...rates)));
    }"""
    for prompts, ahead, behind in (
        (FRENCH, FRENCH_EXPERTS, SUMS_EXPERTS),
        (SUMS, SUMS_EXPERTS, FRENCH_EXPERTS),
    ):
        with asking(inline_url, prompts):
            page.wait_for_function(leads, arg=[ahead, behind])
            page.get_by_role("button", name="Pause").click()
            layer = pixels(page)[64:]
        light = [statistics.mean(luminance(layer[e]) for e in group) for group in (ahead, behind)]
        assert light[0] < light[1] - 20  # light theme: the busier, the darker
        page.get_by_role("button", name="Back to now").click()


def test_hover_and_keys_tell_of_a_cell(page: Page, inline_url: str) -> None:
    open_map(page, inline_url)
    ask(inline_url, SUMS[0])
    until(page, "shoalExperts.load.layerRates[1] > 0")
    point_at(page, 32 + 17)
    card = page.locator("#card")
    card.get_by_text("Layer 2 · expert 17").wait_for()
    for text in ("rows/s", "of the layer", "replicas", "held by", "experts-"):
        assert text in card.inner_text()
    page.mouse.move(1, 1)
    card.wait_for(state="hidden")
    page.locator("#map").focus()
    for key, expected in (
        ("ArrowRight", "Layer 1, expert 1:"),
        ("ArrowDown", "Layer 2, expert 1:"),
        ("End", "Layer 2, expert 31:"),
        ("ArrowRight", "Layer 2, expert 31:"),
        ("PageDown", "Layer 3, expert 31:"),
        ("ArrowLeft", "Layer 3, expert 30:"),
        ("Control+Home", "Layer 1, expert 0:"),
    ):
        page.keyboard.press(key)
        assert told(page).startswith(expected), key
        assert expected[:-1].replace(",", " ·") in card.inner_text()
    assert re.search(r"rows/s.* replicas? on experts-", told(page))


def test_colours_by_replicas_and_by_worker(page: Page, inline_url: str) -> None:
    open_map(page, inline_url)
    page.get_by_role("button", name="Pause").click()  # replicas may come meanwhile
    page.get_by_text("Worker", exact=True).first.click()
    first, second = page.evaluate("shoalExperts.load.seats")
    holders = page.evaluate("shoalExperts.load.holders")
    assert {first, second} == {0, 1}
    blue, orange = (0, 114, 178, 255), (230, 159, 0, 255)
    expected = [(blue, orange)[holding[0]] for holding in holders]  # the left stripe of several
    assert pixels(page) == expected
    page.get_by_text("Replicas", exact=True).first.click()
    by_replicas = dict(zip(map(len, holders), pixels(page), strict=True))
    assert len(set(by_replicas.values())) == len(by_replicas)
    assert "1" in page.locator("#legend").inner_text()


def test_pause_holds_the_moment_and_the_past_can_be_seen(page: Page, inline_url: str) -> None:
    open_map(page, inline_url)
    until(page, "shoalExperts.history.frames.length >= 3")
    page.get_by_role("button", name="Pause").click()
    paused = page.locator("#moment-text").inner_text()
    known = page.evaluate("shoalExperts.history.frames.length")
    until(page, f"shoalExperts.history.frames.length >= {known + 2}")
    assert page.locator("#moment-text").inner_text() == paused != "now"
    page.locator("#moment").focus()
    page.keyboard.press("Home")
    earliest = page.evaluate("shoalExperts.history.frames[0].at_s")
    assert page.evaluate("shoalExperts.history.at(shoalExperts.at_s).at_s") == earliest
    page.get_by_role("button", name="Back to now").click()
    assert page.locator("#moment-text").inner_text() == "now"


# ---- of crafted clusters


def test_workers_and_replicas_come_and_go(page: Page, inline_url: str) -> None:
    moments = [["experts-a", "experts-b"], ["experts-b"], ["experts-b", "experts-c"]]
    now = 0
    stream(page, lambda _: [load_of(moments[now], epoch=1 + now)])
    statuses(page, lambda: status_of(moments[now]))
    open_map(page, inline_url)
    until(page, "shoalExperts.history.newest.status")  # who leaves has been seen
    now = 1
    page.locator("#workers tr.left", has_text="experts-a").wait_for()  # shown for some seconds
    wait_for_events(page, "experts-a left", "epoch 1 → 2", "replicas 4 added, 4 dropped")
    now = 2
    page.locator("#workers tr.joined", has_text="experts-c").wait_for()
    wait_for_events(page, "experts-c joined", "epoch 2 → 3")
    assert "2 of 2 present" in page.locator("#workers").inner_text()


@pytest.mark.parametrize(
    ("button", "path", "body"),
    [
        ("Kill", "/v1/chaos", {"action": "kill", "role": "expert", "worker": "experts-a"}),
        ("Drain", "/v1/experts/drain", {"worker": "experts-a"}),
    ],
)
def test_kill_and_drain_ask_back(
    page: Page, inline_url: str, button: str, path: str, body: Json
) -> None:
    sent: list[Request] = []

    def take(route: Route) -> None:
        sent.append(route.request)
        route.fulfill(json={"done": "so be it"})

    page.route(f"**{path}", take)
    stream(page, lambda _: [load_of(["experts-a", "experts-b"])])
    statuses(page, lambda: status_of(["experts-a", "experts-b"]))
    open_map(page, inline_url)
    line = page.locator("#workers tr", has_text="experts-a")
    line.get_by_role("button", name=button).click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Cancel").click()
    assert sent == []
    line.get_by_role("button", name=button).click()
    assert f"{button} experts-a?" in dialog.inner_text()
    dialog.get_by_role("button", name=button).click()
    page.get_by_text("so be it").wait_for()
    assert [request.post_data_json for request in sent] == [body]


def test_directory_away_is_said_and_ends(page: Page, inline_url: str, problems: list[str]) -> None:
    message = "The directory cannot be reached."
    error = {"error": {"message": message, "code": "directory_unreachable"}}
    page.route(STREAM, lambda route: route.fulfill(status=503, json=error))
    page.goto(inline_url + "/experts")
    page.locator("#feed[data-kind=directory]", has_text=message).wait_for()
    until(page, "shoalExperts.history.newest?.status")  # the rest goes on
    page.unroute(STREAM)
    page.locator("#feed[data-kind=live]").wait_for()
    until(page, "window.shoalExperts?.load")
    assert all("503" in problem for problem in problems)
    problems.clear()


def test_a_stream_that_the_server_ends_is_no_fault(page: Page, inline_url: str) -> None:
    opened = 0

    def loads(connection: int) -> Sequence[Json]:
        nonlocal opened
        opened = connection + 1
        return [load_of(["experts-a"], epoch=opened)]

    stream(page, loads)
    open_map(page, inline_url)
    page.locator("#feed[data-kind=live]").wait_for()
    page.evaluate("""() => {
        const feed = document.getElementById("feed");
        window.kinds = [];
        new MutationObserver(() => kinds.push(feed.dataset.kind)).observe(feed, {
            attributes: true, attributeFilter: ["data-kind"],
        });
    }""")
    before = opened
    until(page, f"shoalExperts.load.epoch >= {before + 2}")
    assert set(page.evaluate("() => kinds")) <= {"live"}


def test_asks_for_a_key_once(page: Page, inline_url: str, problems: list[str]) -> None:
    refused = 0

    def guard(route: Route) -> None:
        nonlocal refused
        if route.request.headers.get("authorization") == "Bearer right":
            return route.continue_()
        refused += 1
        return route.fulfill(status=401, json={"error": {"message": "Key?", "code": "no_key"}})

    for pattern in (STREAM, "**/status"):
        page.route(pattern, guard)
    page.goto(inline_url + "/experts")
    page.locator("#feed[data-kind=key]", has_text="Key?").wait_for()
    page.get_by_label("API key").fill("right")
    page.get_by_role("button", name="Use", exact=True).click()
    until(page, "window.shoalExperts?.load")
    assert refused == 2  # the stream and the state, once each
    assert all("401" in problem for problem in problems)
    problems.clear()


def test_draws_a_map_of_v3s_size_within_a_frame(
    page: Page, inline_url: str, record_property: Any
) -> None:
    workers = [f"experts-{i:02}" for i in range(32)]
    stream(page, lambda n: [load_of(workers, 58, 256, hot=n % 256)])
    statuses(page, lambda: status_of(workers))
    page.goto(inline_url + "/experts")  # with motion: about 20 pictures a second
    until(page, "shoalExperts.history.frames.length >= 3")
    drawn_ms = page.evaluate("""async () => {
        const all = [];
        for (let i = 0; i < 60; i += 1) {
            shoalExperts.map.moveTo(i * 200);
            all.push(shoalExperts.map.picture.drawn_ms);
            await new Promise(requestAnimationFrame);
        }
        return all;
    }""")
    least_ms = min(drawn_ms)  # what others that run on this machine do not prolong
    record_property("drawn_ms", least_ms)
    print(f"58 x 256: {least_ms:.1f} ms a picture, {max(drawn_ms):.1f} ms at most")
    assert least_ms < FRAME_MS
    assert page.evaluate("shoalExperts.load.rates.length") == 14_848
    point_at(page, 57 * 256 + 255)
    assert "Layer 58 · expert 255" in page.locator("#card").inner_text()


# ---- on Ray


@pytest.mark.ray
def test_killed_expert_worker_vanishes_and_another_appears(
    page: Page, checkpoint_dir: Callable[[str], Path]
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="map-"))
    with deployed(checkpoint_dir("v3"), SETTINGS, folder, stop=signal.SIGINT) as deployment:
        url, model = deployment.server.url, deployment.server.model
        open_map(page, url)
        victim = min(worker["worker_id"] for worker in deployment.workers("experts"))
        with chatting(url, model) as answers:
            line = page.locator("#workers tr", has_text=victim)
            line.get_by_role("button", name="Kill").click()
            page.get_by_role("dialog").get_by_role("button", name="Kill").click()
            wait_for_events(page, f"expert worker {victim} left")
            until(page, "shoalExperts.load.workers.length === 1")
            page.locator("#workers tr.joined").wait_for(timeout=120_000)
            until(page, "shoalExperts.load.workers.length === 2")
            until(page, "shoalExperts.load.holders.every((of) => of.length === 2)")
            page.locator("#workers tr", has_text=victim).wait_for(state="detached")
        assert "2 of 2 present" in page.locator("#workers").inner_text()
        assert len(answers) >= 2 and set(answers) == {"length"}
        page.goto("about:blank")  # before the server goes
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def chatting(url: str, model: str) -> Iterator[list[str]]:
    """One streamed chat after the other meanwhile; gives their finish reasons."""
    reasons: list[str] = []
    stop = threading.Event()

    def run() -> None:
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            while not stop.is_set():
                chunks = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": "Hi"}],
                    max_tokens=32,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                reasons.append([chunk.choices[0].finish_reason for chunk in chunks][-1])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield reasons
    finally:
        stop.set()
        thread.join()
