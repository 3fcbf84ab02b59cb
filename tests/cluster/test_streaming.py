"""Server-sent events as clients see them, byte by byte and through the openai SDK."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from cluster.frontend.service import InferenceService
from cluster.limits import Limits
from tests.fakes import TIMEOUT_S, FakeEngine, TokenClock
from tests.serving import EOS, http_server, ids_of, make_service

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "Hello 漢字!"
HELLO = [*ids_of(TEXT), EOS]
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


class Served:
    def __init__(self, engine: FakeEngine, service: InferenceService, url: str) -> None:
        self.engine, self.service, self.url = engine, service, url
        self.sdk = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        )

    def events(self, path: str, **body: Any) -> list[str]:
        """The raw events of a stream, without their blank lines."""
        defaults = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hi"}
        response = httpx.post(
            self.url + path, json={**defaults, "stream": True, **body}, timeout=TIMEOUT_S
        )
        assert response.status_code == 200, response.text
        assert response.text.endswith("\n\n")
        return response.text[:-2].split("\n\n")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """`serve(engine, limits)`: a Served that is taken down after the test."""
    with ExitStack() as stack:

        def start(
            engine: FakeEngine | None = None, limits: Limits | None = None, **options: Any
        ) -> Served:
            engine = engine or FakeEngine(HELLO)
            service = make_service(tmp_path, engine, limits, system_fingerprint="fp_1", **options)
            url = stack.enter_context(http_server(service))
            stack.callback(engine.close)
            served = Served(engine, service, url)
            stack.enter_context(served.sdk)
            return served

        yield start


def chunks_of(events: list[str]) -> list[Any]:
    """The JSON of all events; the last must be [DONE]."""
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


# ---- framing


def test_chat_stream_is_role_text_finish_done(serve: Callable[..., Served]) -> None:
    chunks = chunks_of(serve().events(CHAT))
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"]["content"] for choice in middle] == list(TEXT)
    assert {choice["finish_reason"] for choice in (first, *middle)} == {None}
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    heads = {(c["id"], c["created"], c["model"], c["object"]) for c in chunks}
    assert len(heads) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["system_fingerprint"] == "fp_1"
    assert not any("usage" in chunk for chunk in chunks)


def test_completion_stream_has_texts(serve: Callable[..., Served]) -> None:
    chunks = chunks_of(serve().events(COMPLETIONS))
    assert [c["choices"][0]["text"] for c in chunks] == [*TEXT, ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {c["object"] for c in chunks} == {"text_completion"}


def test_usage_comes_last_and_only_if_asked(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine(HELLO, cached=2))
    options: dict[str, Any] = {"include_usage": True}
    *chunks, last = chunks_of(served.events(CHAT, stream_options=options))
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": len(HELLO),
        "total_tokens": 5 + len(HELLO),
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert {chunk["usage"] for chunk in chunks} == {None}
    options["continuous_usage_stats"] = True
    chunks = chunks_of(served.events(CHAT, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == len(HELLO)


def test_headers_keep_proxies_from_buffering(serve: Callable[..., Served]) -> None:
    body = {"messages": MESSAGES, "stream": True, "colour": 1}
    headers = {"X-Request-Id": "r-1"}
    response = httpx.post(serve().url + CHAT, json=body, headers=headers, timeout=TIMEOUT_S)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "r-1"
    assert response.headers["x-ignored-params"] == "colour"


def test_token_ids_cover_everything_sampled(serve: Callable[..., Served]) -> None:
    chunks = chunks_of(serve().events(CHAT, return_token_ids=True))
    ids = [i for c in chunks for choice in c["choices"] for i in choice.get("token_ids", [])]
    assert ids == HELLO


def test_several_choices_share_the_stream(serve: Callable[..., Served]) -> None:
    chunks = chunks_of(serve().events(CHAT, n=3, temperature=0))
    texts, finished = [""] * 3, set()
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert choice["index"] not in finished
            texts[choice["index"]] += choice["delta"].get("content", "")
            if choice["finish_reason"]:
                finished.add(choice["index"])
    assert texts == [TEXT] * 3
    assert finished == {0, 1, 2}


def test_stop_string_never_leaks(serve: Callable[..., Served]) -> None:
    chunks = chunks_of(serve().events(CHAT, stop=["漢字", "zz"]))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == "Hello "
    assert chunks[-1]["choices"][0]["stop_reason"] == "漢字"


def test_silent_stream_carries_comments(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine(HELLO, hold_after=1), Limits(ping_interval_s=0.05))
    body = {"messages": MESSAGES, "stream": True}
    with httpx.stream("POST", served.url + CHAT, json=body, timeout=TIMEOUT_S) as response:
        for line in response.iter_lines():
            if line == ": keep-alive":
                served.engine.release()  # enough silence
        assert line == "" or line == "data: [DONE]"


def test_stream_opens_without_its_first_token_after_a_while(
    serve: Callable[..., Served],
) -> None:
    served = serve(FakeEngine(HELLO, hold_after=0), Limits(first_output_wait_s=0.05))
    body = {"messages": MESSAGES, "stream": True}
    with httpx.stream("POST", served.url + CHAT, json=body, timeout=TIMEOUT_S) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert '"role":"assistant"' in next(lines)
        served.engine.release()
        assert list(lines)[-2] == "data: [DONE]"


# ---- errors


def test_error_before_the_first_token_has_a_status(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine([EOS], finish="error", error="out of cache"))
    body = {"messages": MESSAGES, "stream": True}
    response = httpx.post(served.url + CHAT, json=body, timeout=TIMEOUT_S)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_error"
    assert "out of cache" in response.json()["error"]["message"]


def test_error_after_the_first_token_is_an_event_without_done(
    serve: Callable[..., Served],
) -> None:
    served = serve(FakeEngine(HELLO, finish="error", error="worker lost"))
    events = served.events(CHAT)
    assert '"content":"H"' in events[1]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_error")
    with pytest.raises(openai.APIError, match="worker lost"):
        list(served.sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    assert served.service.num_open_sequences == 0


def test_unforeseen_fault_in_the_stream_is_an_event_too(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(FakeEngine(HELLO))
    monkeypatch.setattr("cluster.frontend.streaming.chunk_choice", None)
    error = json.loads(served.events(CHAT)[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == ("internal_error", "The server failed.")


def test_deadline_in_the_stream(serve: Callable[..., Served]) -> None:
    clock = TokenClock(2, leap_s=0.2)
    served = serve(FakeEngine(HELLO, hold_after=2), clock=clock, observers=[clock])
    events = served.events(CHAT, timeout=0.2)
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert served.engine.wait_for(lambda: len(served.engine.aborted) == 1)


def test_experts_that_stay_away_in_the_stream(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine(HELLO, finish="unavailable", error="layer 3 has no expert 7"))
    error = json.loads(served.events(CHAT)[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "experts_unavailable")


# ---- experts left out


def test_left_out_experts_stand_where_it_happened_and_in_the_end(
    serve: Callable[..., Served],
) -> None:
    served = serve(FakeEngine(HELLO, renormalised={2}))
    chunks = chunks_of(served.events(CHAT))
    told = [i for i, chunk in enumerate(chunks) if chunk.get("renormalised")]
    assert told == [3, len(chunks) - 1]  # behind the role: "H", "e", "l"
    options = {"include_usage": True}
    chunks = chunks_of(served.events(CHAT, stream_options=options))
    assert chunks[-1]["renormalised"] is True and chunks[-1]["choices"] == []


def test_left_out_experts_of_a_held_back_token_stand_where_it_is_shown(
    serve: Callable[..., Served],
) -> None:
    served = serve(FakeEngine(ids_of("abcd") + [EOS], renormalised={1}))
    chunks = chunks_of(served.events(CHAT, stop="bcX"))
    (told, _) = [chunk for chunk in chunks if chunk.get("renormalised")]
    assert told["choices"][0]["delta"]["content"] == "bcd"


@pytest.mark.parametrize(("token", "header"), [(0, "true"), (5, None)])
def test_header_of_a_stream_tells_what_is_known_by_then(
    serve: Callable[..., Served], token: int, header: str | None
) -> None:
    served = serve(FakeEngine(HELLO, renormalised={token}))
    body = {"messages": MESSAGES, "stream": True}
    response = httpx.post(served.url + CHAT, json=body, timeout=TIMEOUT_S)
    assert response.headers.get("x-shoal-renormalised") == header


# ---- clients that leave


@pytest.mark.parametrize(("stream", "hold_after"), [(True, 3), (True, 0), (False, 3)])
def test_disconnect_aborts_within_half_a_second(
    serve: Callable[..., Served], stream: bool, hold_after: int
) -> None:
    served = serve(FakeEngine(HELLO, hold_after=hold_after))
    engine, parts = served.engine, urlsplit(served.url)
    content = json.dumps({"messages": MESSAGES, "stream": stream, "n": 2}).encode()

    def seconds_to_abort() -> float:
        num_submitted = len(engine.submitted) + 2
        with socket.create_connection((parts.hostname, parts.port), TIMEOUT_S) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(content), content)
            )
            assert engine.wait_for(lambda: len(engine.submitted) == num_submitted)
            if stream and hold_after:
                while b'"content":"e"' not in client.recv(65_536):
                    pass
        left_s = time.monotonic()
        assert engine.wait_for(lambda: len(engine.aborted) == num_submitted)
        assert served.service.num_open_sequences == 0
        return time.monotonic() - left_s

    # One of ten: the question is what the server needs, not what else the machine does.
    assert any(seconds_to_abort() < 0.5 for _ in range(10))


def test_client_that_reads_nothing_is_dropped(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    """The stream fills the socket's buffers; when they stay full, its sequences are aborted."""
    caplog.set_level("INFO", "cluster.frontend.streaming")
    engine = FakeEngine([*ids_of("x") * 100, EOS])
    served = serve(engine, Limits(slow_client_s=0.2))
    content = json.dumps(
        {"messages": MESSAGES, "stream": True, "n": 128, "logprobs": True, "top_logprobs": 20}
    ).encode()
    parts = urlsplit(served.url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((parts.hostname, parts.port))
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
        )
        assert engine.wait_for(lambda: len(engine.aborted) > 0)
    assert "slow client dropped" in caplog.text


# ---- the openai SDK


def test_sdk_streams_a_chat(serve: Callable[..., Served]) -> None:
    stream = serve().sdk.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(HELLO)
    text = ""
    for chunk in chunks[1:-1]:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        if choice.logprobs is not None and choice.logprobs.content is not None:
            spelled = bytes(b for t in choice.logprobs.content for b in t.bytes or [])
            assert spelled.decode() == (choice.delta.content or "")  # those of this very chunk
            assert {len(t.top_logprobs) for t in choice.logprobs.content} == {2}
    assert text == TEXT


def test_sdk_streams_a_completion_with_log_probabilities(serve: Callable[..., Served]) -> None:
    stream = serve().sdk.completions.create(
        model="tiny", prompt="ab", stream=True, logprobs=1, echo=True, max_tokens=3
    )
    choices = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.text for choice in choices) == "abHel"
    found = [choice.logprobs for choice in choices if choice.logprobs is not None]
    assert [t for lp in found for t in lp.tokens or ()] == list("abHel")
    assert [o for lp in found for o in lp.text_offset or ()] == [0, 1, 2, 3, 4]


def test_sdk_helper_assembles_the_stream(serve: Callable[..., Served]) -> None:
    with serve().sdk.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].finish_reason == "stop"


def test_async_sdk(serve: Callable[..., Served]) -> None:
    served = serve()

    async def go() -> tuple[str, str | None]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0
        ) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=True
            )
            streamed = "".join([c.choices[0].delta.content or "" async for c in stream])
            whole = await client.chat.completions.create(model="tiny", messages=MESSAGES)
            return streamed, whole.choices[0].message.content

    assert asyncio.run(go()) == (TEXT, TEXT)
