"""What the log has of real requests over HTTP and gRPC: one line each, and none of their text."""

from __future__ import annotations

import io
import json
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.config import parse_config
from cluster.frontend.api_keys import KeyRing
from cluster.frontend.auth import Authorizer
from cluster.inline import InlineCluster
from cluster.observability.logs import console_logs
from cluster.observability.request_log import RequestLog
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from cluster.session import running
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import EOS, grpc_server, http_server, ids_of, make_service

SECRET = "Xylophon-Quarz"
ANSWER = "Zebra-Walzer"
CHAT = "/v1/chat/completions"
QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 24}
GRPC_QUESTION = pb.ChatRequest(
    messages=[pb.ChatMessage(role="user", content=SECRET)],
    sampling=pb.SamplingParams(max_tokens=24),
)


class Clients:
    """HTTP and gRPC to one service, and all that was logged down to DEBUG, as JSON."""

    def __init__(self, stack: ExitStack, service: Any) -> None:
        self.service = service
        self._log = io.StringIO()
        stack.enter_context(console_logs("json", logging.DEBUG, stream=self._log))
        self.url = stack.enter_context(http_server(service))
        channel = grpc.insecure_channel(stack.enter_context(grpc_server(service)))
        self.stub = inference_pb2_grpc.InferenceStub(stack.enter_context(channel))

    def post(self, body: Any = QUESTION, path: str = CHAT, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        return httpx.post(self.url + path, content=content, headers=headers, timeout=TIMEOUT_S)

    def chat(self, message: pb.ChatRequest = GRPC_QUESTION, **metadata: str) -> str:
        """The text; "" after an error."""
        with suppress(grpc.RpcError):
            call = self.stub.Chat(message, timeout=TIMEOUT_S, metadata=list(metadata.items()))
            return "".join(event.delta.text for event in call)
        return ""

    def lines(self, *messages: str) -> list[dict[str, Any]]:
        """Events with one of these messages; any if there are none."""
        events = [json.loads(line) for line in self._log.getvalue().splitlines()]
        return [event for event in events if not messages or event["msg"] in messages]

    def assert_nobody_told(self, *secrets: str) -> None:
        log = self._log.getvalue()
        assert log
        for secret in secrets:
            assert secret not in log
            assert ", ".join(map(str, ids_of(secret))) not in log  # nor its tokens


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Clients]]:
    """`serve(engine)`: clients of a service with a request log over it."""
    with ExitStack() as stack:

        def start(engine: FakeEngine | None = None, keys: KeyRing | None = None) -> Clients:
            engine = engine or FakeEngine([*ids_of(ANSWER), EOS], cached=3)
            stack.callback(engine.close)
            service = make_service(
                tmp_path, engine, observers=[RequestLog()], authorizer=Authorizer(keys)
            )
            return Clients(stack, service)

        yield start


def test_one_line_a_request_with_the_ids_of_both_sides(serve: Any) -> None:
    clients = serve()
    whole = clients.post(**{"X-Request-Id": "mine-1"}).json()
    clients.post({**QUESTION, "stream": True}, **{"X-Request-Id": "mine-2"})
    assert clients.chat(**{"x-request-id": "mine-3"}) == ANSWER
    first, second, third = clients.lines("request")
    assert [line["request_id"] for line in (first, second, third)] == ["mine-1", "mine-2", "mine-3"]
    assert (first["id"], first["protocol"], first["kind"]) == (whole["id"], "http", "chat")
    assert (first["stream"], second["stream"], third["protocol"]) == (False, True, "grpc")
    expected = {
        **{"prompt_tokens": len(SECRET) + 3, "cached_tokens": 3, "completion_tokens": 13},
        **{"outcome": "ok", "finish": "stop", "sequences": 1, "replays": 0},
    }
    for line in (first, second, third):
        assert {name: line[name] for name in expected} == expected
        assert 0 < line["ttft_ms"] <= line["e2e_ms"] < 1e3 * TIMEOUT_S


def test_refused_requests_have_a_line_too_and_only_one(serve: Any) -> None:
    clients = serve()
    bad: list[Any] = [b"{", {**QUESTION, "temperature": 9}, {**QUESTION, "model": SECRET}]
    for body in bad:
        assert clients.post(body).status_code in (400, 404)
    assert clients.chat(pb.ChatRequest(model=SECRET)) == ""
    refused = clients.lines("refused")
    assert [line["code"] for line in refused] == [
        *("invalid_json", "decimal_above_max_value", "model_not_found", "model_not_found")
    ]
    assert len({line["request_id"] for line in refused}) == 4
    assert not clients.lines("request")
    clients.assert_nobody_told(SECRET)


def test_keys_are_told_by_name(serve: Any, tmp_path: Path) -> None:
    key, wrong = "the-key-of-alice", "a-key-that-is-not-there"
    (tmp_path / "keys").write_text(f"alice inference {key}\n")
    clients = serve(keys=KeyRing(tmp_path / "keys"))
    assert clients.post(Authorization=f"Bearer {key}").status_code == 200
    assert clients.chat(authorization=f"Bearer {key}") == ANSWER
    assert clients.post(Authorization=f"Bearer {wrong}").status_code == 401
    assert clients.post().status_code == 401
    assert clients.chat(authorization=f"Bearer {wrong}") == ""
    assert [line["key"] for line in clients.lines("request")] == ["alice", "alice"]
    assert [line["code"] for line in clients.lines("refused")] == [
        *("invalid_api_key", "missing_api_key", "invalid_api_key")
    ]
    clients.assert_nobody_told(key, wrong)


@pytest.mark.parametrize(
    "given", [b"a\x0blevel=error", b'b" msg="forged', b"c\x85d\xe2\x80\xa8e", b"x" * 5000, b"\t"]
)
def test_hostile_ids_stay_short_and_plain(serve: Any, given: bytes) -> None:
    clients = serve()
    body = json.dumps(QUESTION).encode()
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" % CHAT.encode()
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
    host, port = clients.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), TIMEOUT_S) as client:
        client.sendall(head + b"X-Request-Id: " + given + b"\r\n\r\n" + body)
        status = b"".join(iter(lambda: client.recv(65536), b"")).split()[1]
    found = clients.lines("request")
    assert len(found) == (status == b"200")  # uvicorn refuses some headers itself
    for line in found:
        assert line["request_id"].replace(".", "").replace("-", "").replace(":", "").isalnum()
        assert len(line["request_id"]) <= clients.service.limits.max_request_id_chars


def test_no_failure_tells_what_was_asked_or_answered(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = FakeEngine(
        [*ids_of(ANSWER), EOS], lose=lambda submit, attempt: 4 if attempt < 3 else None
    )
    clients = serve(lost)
    assert ANSWER in clients.post().text and clients.chat() == ANSWER  # after two replays each
    assert len(clients.lines("request")) == 2
    for broken in (
        {"messages": SECRET},
        {"messages": [{"role": SECRET, "content": SECRET}]},
        {**QUESTION, SECRET: 1},
        {**QUESTION, "stop": [SECRET] * 99},
        {**QUESTION, "logit_bias": {SECRET: 1}},
        f'{{"messages": "{SECRET}'.encode(),
        SECRET.encode() * 400_000,
    ):
        clients.post(broken)
    clients.post(path=f"/{SECRET}")
    clients.post(Authorization=f"Bearer {SECRET}", **{"X-Request-Timeout": SECRET})
    lost.broken = OSError("no worker")
    clients.post()
    clients.chat()
    lost.broken = None

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError(f"cannot read {SECRET!r}, wanted {ANSWER}")  # as a library might

    monkeypatch.setattr(clients.service.tokenizer, "encode", fail)
    monkeypatch.setattr(clients.service.tokenizer, "apply_chat_template", fail, raising=False)
    assert clients.post().status_code == 500
    assert clients.chat() == ""
    failures = [line for line in clients.lines() if "error" in line]
    assert len(failures) == 2
    assert all(line["error"].rstrip().endswith("ValueError") for line in failures)
    assert all(line["request_id"] for line in failures)
    clients.assert_nobody_told(SECRET, ANSWER)


def test_nothing_in_the_other_tiers_tells_it(checkpoint_dir: Callable[[str], Path]) -> None:
    config = parse_config(
        {"model": str(checkpoint_dir("v3")), "router": {"mode": "deployment"}, "device": "cpu"}
    )
    with ExitStack() as stack:
        log = io.StringIO()
        stack.enter_context(console_logs("json", logging.DEBUG, stream=log))
        cluster = stack.enter_context(InlineCluster(config))
        clients = Clients(stack, cluster.ingress.service)
        # To the end, for a word of an answer's beginning may be in a log by chance.
        whole = clients.post({**QUESTION, "ignore_eos": True, "seed": 1}).json()
        answer = whole["choices"][0]["message"]["content"]
        sampling = pb.SamplingParams(max_tokens=24, ignore_eos=True, seed=2)
        text = clients.chat(pb.ChatRequest(messages=GRPC_QUESTION.messages, sampling=sampling))
        assert min(len(answer), len(text)) > 8
        clients.post({**QUESTION, "max_tokens": 4, "timeout": 0.001})
        clients.post({**QUESTION, "stream": True})
        clients.assert_nobody_told(SECRET, answer, text)
        assert SECRET not in log.getvalue()


@pytest.mark.parametrize("show_log", [True, False])
def test_the_console_is_quiet_unless_the_log_is_asked_for(
    checkpoint_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str], show_log: bool
) -> None:
    settings = {
        "model": str(checkpoint_dir("v3")),
        "listen": {"http_port": 0, "grpc_port": 0},
        "observability": {"log_format": "json", "log_prompts": True},
    }
    with running(parse_config(settings), inline=True, show_log=show_log) as server:
        capsys.readouterr()
        httpx.post(f"{server.url}{CHAT}", json=QUESTION, timeout=TIMEOUT_S)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    told = {event["msg"]: event for event in map(json.loads, lines)}
    assert ("request" in told, "prompt" in told) == (show_log, show_log)
    if show_log:
        assert SECRET in told["prompt"]["text"]
        assert told["prompt"]["sequence"] == told["request"]["id"] + "-0"
