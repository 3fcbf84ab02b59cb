"""The command line's HTTP client against servers that break off."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cluster.http_client import ApiClient, ApiError

STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\n'


@contextmanager
def server_that_sends(answer: bytes, hangs: bool = False) -> Iterator[str]:
    """Takes one request, sends the answer, and ends it there unless it hangs."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
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
