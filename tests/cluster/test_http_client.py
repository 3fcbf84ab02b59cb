"""The command line's HTTP client against servers that break off."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from shutil import which

import pytest

from cluster.config import ConfigError
from cluster.http_client import ApiClient, ApiError

STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\n'


@contextmanager
def server_that_sends(
    answer: bytes, hangs: bool = False, into: list[bytes] | None = None
) -> Iterator[str]:
    """Takes one request, puts it `into` a list, sends the answer, and ends it there unless it
    hangs."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            request = connection.recv(65536)
            if into is not None:
                into.append(request)
            connection.sendall(answer)
            if not hangs:
                connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join()


CALLS: dict[str, Callable[[ApiClient], object]] = {
    "get": lambda client: client.get("/status"),
    "read_text": lambda client: client.read_text("/metrics"),
    "post": lambda client: client.post("/v1/scale", {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_answer_that_breaks_off_is_an_api_error(call: str) -> None:
    with (
        server_that_sends(STREAM + b"9\r\n{") as url,
        pytest.raises(ApiError, match=f"the answer of {url} broke off: IncompleteRead"),
    ):
        CALLS[call](ApiClient(url))


def test_a_chat_that_breaks_off_is_an_api_error_after_its_text() -> None:
    with server_that_sends(STREAM + b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK)) as url:
        pieces = ApiClient(url).chat([])
        assert next(pieces) == "Hi"
        with pytest.raises(ApiError, match="the answer broke off"):
            next(pieces)


@pytest.mark.parametrize(
    ("answer", "timeout_s", "fault"),
    [
        (b"", 0.1, "no Shoal at {}: timed out; start it"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
            2.0,  # in which the beginning must come
            "the answer of {} broke off: timed out$",
        ),
    ],
)
def test_an_answer_that_hangs_is_an_api_error(answer: bytes, timeout_s: float, fault: str) -> None:
    with (
        server_that_sends(answer, hangs=True) as url,
        pytest.raises(ApiError, match=fault.format(url)),
    ):
        ApiClient(url, timeout_s).read("/status")


def test_text_of_an_answer() -> None:
    with server_that_sends(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\na 1\n\xff") as url:
        assert ApiClient(url).read_text("/metrics") == "a 1\n\N{REPLACEMENT CHARACTER}"
    head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
    with server_that_sends(head) as url, pytest.raises(ApiError, match="401 Set SHOAL_API_KEY"):
        ApiClient(url).read_text("/metrics")


@pytest.mark.parametrize(
    "url",
    ["ftp://host", "http://", "localhost:80a", "http://host:99999", "http://host:0", "http://[::1"],
)
def test_an_url_that_cannot_be_is_a_setting_of_the_user(url: str) -> None:
    with pytest.raises(ConfigError, match="expected http://HOST:PORT or https://HOST$"):
        ApiClient(url)


def test_paths_are_behind_that_of_the_url() -> None:
    requests: list[bytes] = []
    with server_that_sends(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", into=requests) as url:
        assert ApiClient(f"{url}/shoal/").get("/status") == (200, {})
    assert requests[0].startswith(b"GET /shoal/status HTTP/1.1\r\n")


class Nothing(BaseHTTPRequestHandler):
    """Answers every GET with an empty object."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def https(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """URL of a server behind TLS and its certificate, which nobody trusts yet."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ("-subj", "/CN=shoal", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", key, "-out", certificate)
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = HTTPServer(("127.0.0.1", 0), Nothing)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}", certificate
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(not which("openssl"), reason="openssl makes the certificate")
def test_https_with_a_certificate_that_is_checked(
    https: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, certificate = https
    with pytest.raises(ApiError, match=f"no Shoal at {url}: .*certificate verify failed"):
        ApiClient(url).get("/status")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert ApiClient(url).get("/status") == (200, {})
