"""Web pages as files: types, caching, headers, and that nothing else can be fetched."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection

import httpx
import pytest

from cluster.frontend.web import ASSETS, PAGES, read_assets
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import http_server, make_service

VENDOR = ASSETS / "vendor"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    engine = FakeEngine([])
    service = make_service(tmp_path_factory.mktemp("web") / "model", engine)
    with http_server(service) as url, httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        yield client
    engine.close()


@pytest.mark.parametrize(
    ("path", "media_type", "file"),
    [
        ("/", "text/html; charset=utf-8", "chat.html"),
        ("/assets/chat.css", "text/css; charset=utf-8", "chat.css"),
        ("/assets/chat.js", "text/javascript; charset=utf-8", "chat.js"),
        ("/assets/vendor/purify.es.mjs", "text/javascript; charset=utf-8", "vendor/purify.es.mjs"),
        ("/assets/shoal.svg", "image/svg+xml", "shoal.svg"),
    ],
)
def test_files_come_as_they_are(
    client: httpx.Client, path: str, media_type: str, file: str
) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    assert answer.content == (ASSETS / file).read_bytes()
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(answer.content))
    assert head.headers["etag"] == answer.headers["etag"]


def test_a_file_that_the_browser_has_is_not_sent_again(client: httpx.Client) -> None:
    etag = client.get("/assets/common.js").headers["etag"]
    digest = hashlib.sha256((ASSETS / "common.js").read_bytes()).hexdigest()
    assert etag == f'"{digest}"'
    for given, status in [
        (etag, 304),
        (f'"other", W/{etag}', 304),  # as proxies that compress make of it
        ('"other"', 200),
        ("", 200),
    ]:
        again = client.get("/assets/common.js", headers={"If-None-Match": given})
        assert again.status_code == status, given
        assert again.headers["etag"] == etag
        assert again.headers["cache-control"] == "no-cache"
        assert (again.content == b"") is (status == 304)


@pytest.mark.parametrize("path", ["/", "/assets/common.js", "/assets/shoal.svg"])
def test_every_file_says_what_a_page_may_do(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "target",
    [
        "/assets/",
        "/assets/chat",
        "/assets/missing.js",
        "/assets/../web.py",
        "/assets/%2e%2e/web.py",
        "/assets/..%2fweb.py",
        "/assets/..%5cweb.py",
        "/assets//etc/passwd",
        "/assets/%2fetc%2fpasswd",
        "/assets/chat/../chat.js",
        "/assets/chat.js%00",
        "/assets/CHAT.JS",
        "/assets/vendor/README.md",
        "/assets/vendor/LICENSE-marked",
    ],
)
def test_only_files_of_the_pages_can_be_fetched(client: httpx.Client, target: str) -> None:
    with closing(HTTPConnection(client.base_url.netloc.decode(), timeout=TIMEOUT_S)) as connection:
        connection.request("GET", target)  # exactly as written
        answer = connection.getresponse()
        error = json.loads(answer.read())["error"]
    assert answer.status == 404
    assert error["type"] == "invalid_request_error"
    assert answer.headers["content-security-policy"] is None


@pytest.mark.parametrize("path", ["/", "/experts", "/assets/chat.js"])
def test_pages_are_only_read(client: httpx.Client, path: str) -> None:
    answer = client.post(path)
    assert answer.status_code == 405
    assert {name.strip() for name in answer.headers["allow"].split(",")} == {"GET", "HEAD"}


def test_pages_are_no_part_of_the_api(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert not paths.keys() & {*PAGES, "/assets/{name}"}


def test_what_pages_name_is_there() -> None:
    """And nothing comes from elsewhere or is written into the page, which the policy forbids."""
    assets = read_assets()
    for page in set(PAGES.values()) & assets.keys():
        html = assets[page].content.decode()
        names = re.findall(r'(?:src|href)="([^"]*)"', html)
        assert names
        assert {name.removeprefix("assets/") for name in names} <= assets.keys()
        assert not re.search(r"<style|<script>|\son\w+=|\sstyle=", html)
    for name in (name for name in assets if name.endswith(".js") and "vendor/" not in name):
        here = (ASSETS / name).parent
        for found in re.findall(r'(?:from|import) "([^"]*)"', (ASSETS / name).read_text()):
            assert (here / found).resolve().is_relative_to(ASSETS)
            assert (here / found).is_file(), (name, found)


def test_vendored_files_are_the_published_ones() -> None:
    readme = (VENDOR / "README.md").read_text()
    rows = re.findall(r"^\| (\S+) \|.*\[(\S+)\].*`(\w{64})` \|$", readme, re.MULTILINE)
    licences = {licence for _, licence, _ in rows}
    assert {name for name, _, _ in rows} | licences | {"README.md"} == {
        path.name for path in VENDOR.iterdir()
    }
    for name, _, digest in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name


def test_all_files_together_are_small() -> None:
    num_bytes = sum(len(gzip.compress(asset.content)) for asset in read_assets().values())
    assert num_bytes < 200_000
