"""The README's first request, over HTTP, to the model that ships."""

from __future__ import annotations

import json
import shlex
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cluster.config import parse_config
from cluster.inline_server import InlineServer
from cluster.launcher import free_port
from tests.cluster.conftest import wait_ready

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Curl:
    """What a command line of curl sends."""

    path: str
    headers: dict[str, str]
    data: str


@pytest.fixture(scope="module")
def request_of_readme() -> Curl:
    """The first `curl` of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = text[text.index("\ncurl ") + 1 :].partition("\n```")[0]
    program, url, *options = shlex.split(command.replace("\\\n", " "))
    assert program == "curl" and set(options[::2]) <= {"-H", "-d"}
    pairs = list(zip(options[::2], options[1::2], strict=True))
    headers = dict(value.split(": ", 1) for option, value in pairs if option == "-H")
    (data,) = (value for option, value in pairs if option == "-d")
    return Curl(urlsplit(url).path, headers, data)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """`shoal serve --inline` of the default model, on a free port."""
    port = free_port()
    server = InlineServer(parse_config({"listen": {"http_port": port}}))
    server.start()
    try:
        wait_ready(f"http://127.0.0.1:{port}", TIMEOUT_S)
        yield f"http://127.0.0.1:{port}"
        server.drain()
    finally:
        server.stop()


def test_first_request_of_the_readme_gets_the_golden_answer(
    request_of_readme: Curl, url: str
) -> None:
    curl = request_of_readme
    prompt = json.loads(curl.data)["messages"][-1]["content"]
    items = json.loads((ROOT / "tests/cluster/default_model_golden.json").read_text("utf-8"))
    (golden,) = (item for item in items if item["prompt"] == prompt)
    request = urllib.request.Request(url + curl.path, curl.data.encode(), curl.headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        answer: dict[str, Any] = json.load(response)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == golden["answer"]
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(golden["token_ids"])
