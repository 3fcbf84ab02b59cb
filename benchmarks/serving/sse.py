"""A lean streaming client of an OpenAI-style server: completions of token ids as SSE.

Written for measuring: a general HTTP client costs more a token than the server under test, on the
same cores. Standard library only.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from serving.drive import OnTokens

POLL_S = 0.05
DATA = b"data: "


def get_json(url: str, path: str) -> tuple[int, Any]:
    """Status and JSON body (None if it is none). Raises OSError."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except http.client.HTTPException as error:
        raise OSError(f"{url}{path}: {error!r}") from error
    finally:
        connection.close()
    try:
        return response.status, json.loads(body)
    except ValueError:
        return response.status, None


def wait_until_ok(url: str, path: str, timeout_s: float) -> None:
    """Ask until the answer is 200. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if get_json(url, path)[0] == 200:
                return
        except OSError:
            pass  # nothing listens yet
        time.sleep(POLL_S)
    raise TimeoutError(f"{url}{path}: no 200 within {timeout_s:.0f} s")


class SseTarget:
    """A `drive.Target` over HTTP: a connection a request, all on the event loop of one thread."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._model = get_json(url, "/v1/models")[1]["data"][0]["id"]
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._loop.run_forever, name="sse", daemon=True).start()

    def submit(self, prompt_ids: list[int], new_tokens: int, on_tokens: OnTokens) -> None:
        """Start a request and return at once."""
        body = json.dumps(
            {
                "model": self._model,
                "prompt": prompt_ids,
                "max_tokens": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,  # text alone does not tell how many tokens came
            }
        ).encode()
        self._loop.call_soon_threadsafe(self._start, body, on_tokens)

    def _start(self, body: bytes, on_tokens: OnTokens) -> None:
        task = self._loop.create_task(self._complete(body, on_tokens))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _complete(self, body: bytes, on_tokens: OnTokens) -> None:
        error: str | None = None
        try:
            async for event in self._events(body):
                if event == b"[DONE]":
                    break
                chunk = json.loads(event)
                choice = chunk["choices"][0] if chunk.get("choices") else {}
                if count := len(choice.get("token_ids") or ()):
                    on_tokens(count, False, None)
                if "error" in chunk:
                    raise ValueError(json.dumps(chunk["error"]))
        except (OSError, ValueError, EOFError) as fault:
            error = repr(fault)
        on_tokens(0, True, error)

    async def _events(self, body: bytes) -> AsyncIterator[bytes]:
        """The data of each server-sent event."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\n"
                + f"Host: {self._host}:{self._port}\r\n".encode()
                + b"Content-Type: application/json\r\nConnection: close\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            if head.split(maxsplit=2)[1] != b"200":
                raise ValueError(f"{head[:40]!r} {(await reader.read(1000))!r}")
            rest = b""
            async for part in _chunks(reader):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.startswith(DATA):
                        yield line[len(DATA) :].strip()
        finally:
            writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Bodies of a chunked transfer."""
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)  # CR LF
