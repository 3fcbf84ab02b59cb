"""The chat page in Chromium: over the model that ships, and over an engine that tests control."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from attention.engine import Engine
from cluster.frontend.api_keys import KeyRing
from cluster.frontend.auth import Authorizer
from cluster.frontend.backend import Readiness
from tests.browser.conftest import PREFIX
from tests.cluster.conftest import Server
from tests.fakes import FakeEngine
from tests.serving import EOS, http_server, ids_of, make_service

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = pytest.mark.browser
KEY = "a-key-for-the-page"
STORY = "Tell me a story about a brave fox named Pip."
STEP_S, NUM_TOKENS = 0.02, 80
Serve = Callable[..., tuple[str, FakeEngine]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """`serve("text", hold_after=3)`: a server that answers so; gives its URL and its engine."""
    with ExitStack() as stack:

        def start(
            text: str, authorizer: Authorizer | None = None, **settings: Any
        ) -> tuple[str, FakeEngine]:
            engine = FakeEngine([*ids_of(text), EOS], **settings)
            stack.callback(engine.close)
            service = make_service(
                tmp_path / "model", engine, authorizer=authorizer or Authorizer()
            )
            return stack.enter_context(http_server(service)), engine

        yield start


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    page.keyboard.press("Enter")


def ended(page: Page) -> None:
    """Wait until no answer is coming in."""
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page.locator("[aria-busy=true]")).to_have_count(0)


def answers(page: Page) -> list[str]:
    return page.locator(".turn.assistant .text").all_inner_texts()


# ---- the model that ships


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token takes STEP_S at least: what a slow machine's page shows meanwhile can be seen."""
    step = Engine.step

    def slow(engine: Engine) -> Any:
        time.sleep(STEP_S)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow)


@pytest.mark.usefixtures("unhurried")
def test_an_answer_streams(page: Page, inline_url: str) -> None:
    page.goto(inline_url)
    expect(page.get_by_role("status").first).to_have_text("ready")
    expect(page.get_by_role("heading", name="Ask shoal-tiny")).to_be_visible()
    page.evaluate(
        """() => {
          window.lengths = new Set();
          const note = () => window.lengths.add(document.querySelector("#turns").innerText.length);
          new MutationObserver(note).observe(document.querySelector("#turns"),
                                             {subtree: true, childList: true});
        }"""
    )
    page.get_by_label("Max tokens").fill(str(NUM_TOKENS))
    page.get_by_role("button", name=STORY).click()
    expect(page.locator(".turn.assistant")).to_contain_text("brave fox named Pip. He had")
    ended(page)
    assert page.evaluate("window.lengths.size") > 2  # more than before and after
    facts = page.locator(".facts").inner_text()
    found = re.match(r"(\d+) tokens · ([\d.]+) tok/s · first token [\d.]+ m?s · [\d.]+ m?s", facts)
    assert found, facts
    went = r"queue .* · prefill .* · decode .* · waiting for experts \d+ % · cost [\d.]+ expert-ms"
    assert re.search(went, facts), facts
    body = {"messages": [{"role": "user", "content": STORY}], "max_tokens": NUM_TOKENS}
    whole = httpx.post(inline_url + "/v1/chat/completions", json=body, timeout=300).json()
    assert answers(page) == [whole["choices"][0]["message"]["content"]]
    assert int(found[1]) == whole["usage"]["completion_tokens"]


@pytest.mark.usefixtures("unhurried")
def test_stop_reaches_the_engine(page: Page, inline_url: str) -> None:
    page.goto(inline_url)
    page.get_by_label("Temperature").fill("2")  # rambles up to the end of the context
    page.get_by_label("Seed").fill("3")
    ask(page, STORY)
    expect(page.locator(".facts")).to_contain_text("tok/s")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_have_text("Stopped.")
    ended(page)
    Server(inline_url, "", "shoal-tiny").wait_idle()
    assert int(page.locator(".facts").inner_text().split()[0]) < 1500


def test_the_code_runs_and_answers_the_same(page: Page, inline_url: str) -> None:
    page.goto(inline_url)
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Stop at, one a line").fill("'\\n")
    ask(page, 'How do you say "the red house" in French? It\'s $HOME `x` \\ é')
    ended(page)
    page.get_by_role("button", name="As code").click()
    python = page.get_by_label("Python").inner_text()
    curl = page.get_by_label("curl").inner_text()
    answer = answers(page)[0].strip()
    assert run([sys.executable, "-c", python]).strip() == answer
    events = [line.removeprefix("data: ") for line in run(["bash", "-c", curl + " -s"]).split("\n")]
    chunks = [json.loads(event) for event in events if event.startswith("{")]
    pieces = [choice["delta"].get("content", "") for c in chunks for choice in c["choices"]]
    assert "".join(pieces).strip() == answer


def run(command: list[str]) -> str:
    proxied = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"}
    env = {name: value for name, value in os.environ.items() if name not in proxied}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_below_a_prefix(page: Page, inline_url: str) -> None:
    paths = []
    page.on("request", lambda request: paths.append(httpx.URL(request.url).path))
    page.goto(inline_url + PREFIX + "/")
    ask(page, "What is 37 + 45?")
    ended(page)
    assert "82" in answers(page)[0]
    assert {path for path in paths if not path.startswith(PREFIX + "/")} == set()
    assert PREFIX + "/v1/chat/completions" in paths
    links = page.get_by_role("navigation").get_by_role("link").all()
    hrefs = [link.evaluate("link => link.href") for link in links]
    assert hrefs == [inline_url + PREFIX + "/", inline_url + PREFIX + "/experts"]
    page.get_by_role("button", name="As code").click()
    expect(page.get_by_label("curl")).to_contain_text(f"{inline_url}{PREFIX}/v1/chat/completions")


# ---- requests


def test_settings_are_what_is_sent(page: Page, serve: Serve) -> None:
    url, engine = serve("ok")
    page.goto(url)
    for label, text in {
        "System prompt": "Be short.",
        "Temperature": "0.25",
        "Top p": "0.9",
        "Max tokens": "7",
        "Seed": "42",
        "Stop at, one a line": "END\n\\n\\n",
    }.items():
        page.get_by_label(label).fill(text)
    page.get_by_label("Model").select_option("tiny-alias")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hi")
    ended(page)
    assert sent.value.post_data_json == {
        "model": "tiny-alias",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hi"},
        ],
        "temperature": 0.25,
        "top_p": 0.9,
        "max_tokens": 7,
        "seed": 42,
        "stop": ["END", "\n\n"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "timing": True,
    }
    params = engine.submitted[0].params
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.25, 0.9, 7, 42)
    page.reload()
    assert page.get_by_label("Top p").input_value() == "0.9"


def test_empty_fields_are_the_servers_to_choose(page: Page, serve: Serve) -> None:
    url, _ = serve("ok")
    page.goto(url)
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hi")
    ended(page)
    assert sent.value.post_data_json.keys() == {
        *("model", "messages", "stream", "stream_options", "timing")
    }


def test_a_conversation_is_edited_asked_again_and_cleared(page: Page, serve: Serve) -> None:
    url, engine = serve("ok")
    bodies: list[Any] = []

    def note(request: Any) -> None:
        if request.method == "POST":
            bodies.append([message["content"] for message in request.post_data_json["messages"]])

    page.on("request", note)
    page.goto(url)
    for text in "one", "two":
        ask(page, text)
        ended(page)
    page.get_by_label("Send earlier turns").uncheck()
    page.get_by_role("button", name="Regenerate").last.click()
    ended(page)
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edited message").fill("three")
    page.keyboard.press("Enter")
    ended(page)
    assert bodies == [["one"], ["one", "ok", "two"], ["two"], ["three"]]
    page.reload()
    expect(page.locator(".turn")).to_have_text([re.compile("three"), re.compile("ok")])
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)
    assert len(engine.submitted) == 4


# ---- faults


def test_refusals_are_said_plainly(page: Page, serve: Serve, problems: list[str]) -> None:
    url, _ = serve("ok")
    page.goto(url)
    ask(page, "x" * 200)
    note = page.locator(".note.error")
    expect(note).to_contain_text("This model's maximum context length is 128 tokens.")
    expect(note).to_contain_text("(context_length_exceeded)")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edited message").fill("x")
    page.get_by_role("button", name="Send", exact=True).first.click()
    ended(page)
    assert answers(page) == ["ok"]
    assert problems == [
        "Failed to load resource: the server responded with a status of 400 (Bad Request)"
    ]
    problems.clear()


def test_an_error_within_a_stream_keeps_what_came(page: Page, serve: Serve) -> None:
    url, _ = serve("some text", finish="error", error="worker on fire")
    page.goto(url)
    ask(page, "Hi")
    ended(page)
    assert answers(page) == ["some text"]
    expect(page.locator(".note.error")).to_be_visible()


def test_half_an_answer_is_told_from_a_whole_one(page: Page, serve: Serve) -> None:
    """A proxy may end a stream as if all were well."""
    url, _ = serve("ok")
    half = 'data: {"choices": [{"delta": {"content": "so"}, "finish_reason": null}]}\n\n'
    stream = {"body": half, "content_type": "text/event-stream"}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**stream))
    page.goto(url)
    ask(page, "Hi")
    expect(page.locator(".note.error")).to_have_text("The answer broke off.")
    assert answers(page) == ["so"]


def test_experts_that_were_away_are_told_of(page: Page, serve: Serve) -> None:
    url, _ = serve("text", renormalised=[2])
    page.goto(url)
    ask(page, "Hi")
    ended(page)
    expect(page.locator(".note")).to_contain_text("Experts were away for a while")
    assert answers(page) == ["text"]


def test_a_server_that_is_gone(page: Page, serve: Serve, problems: list[str]) -> None:
    url, _ = serve("ok")
    page.goto(url)
    expect(page.get_by_label("Model")).to_have_value("tiny")
    page.context.set_offline(True)
    ask(page, "Hi")
    expect(page.locator(".note.error")).to_have_text("The server cannot be reached.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Regenerate").click()
    ended(page)
    assert answers(page) == ["ok"]
    assert set(problems) == {"Failed to load resource: net::ERR_INTERNET_DISCONNECTED"}
    problems.clear()


def test_a_server_that_still_loads(page: Page, serve: Serve, problems: list[str]) -> None:
    url, engine = serve("ok")
    engine.readiness = Readiness(False, "loading weights", 3, 8)
    page.goto(url)
    expect(page.get_by_text("loading weights")).to_be_visible()
    bar = page.get_by_label("Start of the server")
    assert (bar.get_attribute("max"), bar.evaluate("bar => bar.value")) == ("8", 3)
    page.get_by_label("Message", exact=True).fill("Hi")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_disabled()
    page.keyboard.press("Enter")
    assert engine.submitted == []
    engine.readiness = Readiness(True, "ready")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    expect(bar).to_be_hidden()
    page.keyboard.press("Enter")
    ended(page)
    assert answers(page) == ["ok"]
    assert set(problems) == {
        "Failed to load resource: the server responded with a status of 503 (Service Unavailable)"
    }
    problems.clear()


def serve_with_key(serve: Serve, folder: Path) -> str:
    """URL of a server that wants KEY."""
    keys = folder / "keys"
    keys.write_text(f"page inference {KEY}\n")
    url, _ = serve("ok", Authorizer(KeyRing(keys)))
    return url


def test_a_key_is_asked_for_and_kept_in_the_tab(
    page: Page, serve: Serve, tmp_path: Path, problems: list[str]
) -> None:
    url = serve_with_key(serve, tmp_path)
    page.goto(url)
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(field).to_be_hidden()
    expect(page.get_by_label("Model")).to_have_value("tiny")
    ask(page, "Hi")
    ended(page)
    assert answers(page) == ["ok"]
    page.get_by_role("button", name="As code").click()
    code = page.get_by_role("dialog").inner_text()
    assert KEY not in code
    assert "Bearer $SHOAL_API_KEY" in code
    assert 'os.environ["SHOAL_API_KEY"]' in code
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")
    assert KEY not in page.content()
    assert set(problems) == {
        "Failed to load resource: the server responded with a status of 401 (Unauthorized)"
    }
    problems.clear()


# ---- hostile answers

HOSTILE = """
<script>window.ran = 1</script>

<img src=x onerror="window.ran = 2"> <svg onload="window.ran = 3"></svg>

<iframe srcdoc="<script>parent.ran = 4</script>"></iframe>

<a href="javascript:window.ran = 5">raw</a> [link](javascript:window.ran=6)

[data](data:text/html,<script>window.ran=7</script>) [tab](java&#x09;script:window.ran=8)

![picture](https://example.com/spy.png) <style>body { display: none }</style>

<form action="https://example.com"><button>Sign in</button></form><base href="https://example.com">

<math><mtext><table><mglyph><style><img src=x onerror="window.ran = 9"></style></mglyph></table>

`<img src=x onerror="window.ran = 10">` [fine](https://example.com/page "title") **bold**

<p id=turns name=cookie style="position:fixed;inset:0">over it all</p>

```html
<script>window.ran = 11</script>
```
"""


def test_a_key_is_asked_for_once(
    page: Page, serve: Serve, tmp_path: Path, problems: list[str]
) -> None:
    url = serve_with_key(serve, tmp_path)
    page.clock.install()
    page.goto(url)
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    page.keyboard.press("Escape")
    expect(field).to_be_hidden()
    for _ in range(3):  # whether the server is ready is asked again, nothing else
        with page.expect_response("**/readyz"):
            page.clock.fast_forward(10_000)
    expect(field).to_be_hidden()
    page.get_by_role("button", name="Key", exact=True).click()
    expect(field).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Model")).to_have_value("tiny")
    assert len(problems) == 1 and "401" in problems[0]
    problems.clear()


NO_STORAGE = """
for (const name of ["localStorage", "sessionStorage"]) {
  Object.defineProperty(window, name, {
    get() { throw new DOMException("not here", "SecurityError"); },
  });
}
"""
DAMAGED_STORAGE = """
for (const [name, value] of [["chat", "[{"], ["settings", "null"], ["key", "7"]]) {
  sessionStorage.setItem(`shoal.${name}`, value);
}
"""


@pytest.mark.parametrize("script", [NO_STORAGE, DAMAGED_STORAGE])
def test_what_the_browser_keeps_is_not_needed(page: Page, serve: Serve, script: str) -> None:
    url, _ = serve("ok")
    page.add_init_script(script)
    page.goto(url)
    ask(page, "Hi")
    ended(page)
    assert answers(page) == ["ok"]
    page.get_by_role("button", name="Switch between light and dark").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


@pytest.mark.parametrize(
    ("allowed", "told"), [("true", "Copied."), ("false", "The browser lets no page copy")]
)
def test_a_clipboard_that_is_refused(page: Page, serve: Serve, allowed: str, told: str) -> None:
    """There is another way to copy, which may be refused too."""
    url, _ = serve("ok")
    page.add_init_script(f"""
        const writeText = () => Promise.reject(new DOMException("no", "NotAllowedError"));
        Object.defineProperty(navigator, "clipboard", {{ value: {{ writeText }} }});
        document.execCommand = () => {allowed};
    """)
    page.goto(url)
    ask(page, "Hi")
    ended(page)
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.locator(".toast")).to_contain_text(told)


def test_a_hostile_answer_runs_nothing(page: Page, serve: Serve) -> None:
    url, _ = serve("ok")

    def answer(route: Route) -> None:
        chunk = {"choices": [{"index": 0, "delta": {"content": HOSTILE}, "finish_reason": "stop"}]}
        text = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=text)

    page.route("**/v1/chat/completions", answer)
    page.on("dialog", lambda dialog: pytest.fail(f"a dialog: {dialog.message}"))
    page.goto(url)
    ask(page, "Hi")
    ended(page)
    text = page.locator(".turn.assistant .text")
    expect(text.locator("strong")).to_have_text("bold")
    assert "<script>window.ran = 1</script>" in text.inner_text()  # shown, not run
    assert "over it all" in text.inner_text()
    for link in text.get_by_role("link").all():
        link.evaluate("link => link.target = ''")
        if "example.com" not in link.evaluate("link => link.href"):
            link.click()
    assert page.evaluate("window.ran") is None
    tags = text.evaluate(
        "text => [...new Set([...text.querySelectorAll('*')].map(e => e.tagName))]"
    )
    assert set(tags) <= {"P", "BR", "A", "CODE", "PRE", "STRONG"}
    link = text.get_by_role("link", name="fine")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert text.locator("[style], [id], [name], [onerror], [src]").count() == 0
    page.get_by_label("Show Markdown").uncheck()
    assert text.inner_text().strip() == HOSTILE.strip()
    assert page.evaluate("window.ran") is None


ESCAPES = {
    "markup": "document.body.innerHTML = '<img src=x onerror=\"window.ran = 1\">'",
    "eval": "window.ran = Function('return 1')()",
    "inline script": "document.body.append(Object.assign(document.createElement('script'),"
    " {textContent: 'window.ran = 1'}))",
    "attribute": "document.body.setAttribute('onclick', 'window.ran = 1'); document.body.click()",
    "other host": "await fetch('https://example.com/')",
}


@pytest.mark.parametrize("way", ESCAPES)
def test_the_policy_is_a_wall_of_its_own(
    page: Page, serve: Serve, problems: list[str], way: str
) -> None:
    """What a hole in the sanitiser would let markup try."""
    url, _ = serve("ok")
    page.goto(url)
    outcome = page.evaluate(
        f"""async () => {{
          const refused = [];
          addEventListener("securitypolicyviolation", e => refused.push(e.effectiveDirective));
          const later = () => new Promise(resolve => setTimeout(resolve, 10));
          await later();  // the debugger's own calls may do anything
          try {{ {ESCAPES[way]}; }} catch {{ }}
          for (let i = 0; i < 1000 && !refused.length; i += 1) await later();
          return [window.ran ?? null, refused];
        }}"""
    )
    assert outcome[0] is None
    assert outcome[1], "nothing was refused"
    problems.clear()  # each refusal is in the console


# ---- how it is to use


def test_with_the_keyboard_alone(page: Page, serve: Serve) -> None:
    url, engine = serve("a long answer", hold_after=4)
    page.goto(url)
    expect(page.get_by_label("Model")).to_have_value("tiny")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.get_by_label("Message", exact=True)).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant .text")).to_have_text("a lo")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.press("Escape")
    assert engine.wait_for(lambda: len(engine.aborted) == 1)
    expect(page.locator(".note")).to_have_text("Stopped.")
    expect(page.locator("#announcer")).to_have_text("Answer: a lo")
    ended(page)
    order = []
    page.keyboard.type("x")
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["send", "show-code", "clear", "model", "system"]


def test_an_answer_is_announced_as_a_whole(page: Page, serve: Serve) -> None:
    url, engine = serve("whole", hold_after=2)
    page.goto(url)
    ask(page, "Hi")
    expect(page.get_by_label("Answer")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#announcer")).to_have_text("Answering.")
    engine.release()
    expect(page.locator("#announcer")).to_have_text("Answer: whole")
    expect(page.get_by_label("Answer")).to_have_attribute("aria-busy", "false")


def test_markdown_is_shown(page: Page, serve: Serve) -> None:
    url, _ = serve("# A\n\n- *b*\n\n| c |\n|---|\n| `d` |\n\ndef e:\n    f\n")
    page.goto(url)
    ask(page, "Hi")
    ended(page)
    text = page.locator(".turn.assistant .text")
    for selector, found in {"h1": "A", "li > em": "b", "th": "c", "td > code": "d"}.items():
        expect(text.locator(selector)).to_have_text(found)
    assert text.locator("> p").inner_text() == "def e:\n    f"


def test_dark_and_light(page: Page, serve: Serve, browser: Browser) -> None:
    url, _ = serve("ok")

    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = "rgb(246, 248, 249)", "rgb(15, 21, 25)"
    page.goto(url)
    assert background() == light
    page.emulate_media(color_scheme="dark")
    assert background() == dark
    page.get_by_role("button", name="Switch between light and dark").click()
    assert background() == light
    page.reload()
    assert background() == light
    page.emulate_media(color_scheme="light")
    page.get_by_role("button", name="Switch between light and dark").click()
    assert background() == dark


def test_on_a_phone(page: Page, serve: Serve) -> None:
    url, _ = serve("ok " * 20 + "x" * 40)
    page.set_viewport_size({"width": 360, "height": 640})
    page.goto(url)
    expect(page.get_by_label("Temperature")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("1")
    page.get_by_role("button", name="Settings").click()
    ask(page, "y" * 60)
    ended(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for name in "Send", "As code", "New chat", "Settings":
        box = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360
