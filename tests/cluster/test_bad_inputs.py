"""Bad inputs on both fronts: the answer names the fault, and nothing reaches the engine.

`row` is the number of the input in the project's list of bad inputs. Fields that both fronts have
run on both from one table; what only one of them can express is listed apart.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest, ShoalError, kind_of
from cluster.frontend.json_body import parse_json
from cluster.frontend.openai import ChatCompletionRequest, CompletionRequest
from cluster.frontend.schema_errors import parse_body
from cluster.frontend.service import InferenceService
from cluster.limits import Limits
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import CONTEXT, EOS, VOCAB_SIZE, grpc_server, http_server, ids_of, make_service

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
CHAT_BODY: dict[str, Any] = {"messages": [USER]}
TEXT_BODY: dict[str, Any] = {"prompt": "Hi"}
MAX_ERROR_BYTES = 4096
MAX_CPU_S = 5.0  # 0.1 s here; a bound for slow machines that what grows with the square exceeds


@dataclass
class Front:
    """Both servers over one kind of service each, and the engine behind them."""

    engine: FakeEngine
    url: str
    stub: Any
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=TIMEOUT_S))


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    engine = FakeEngine([*ids_of("ok"), EOS])
    folder = tmp_path_factory.mktemp("front")
    with (
        http_server(make_service(folder / "http", engine)) as url,
        grpc_server(make_service(folder / "grpc", engine)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        front = Front(engine, url, inference_pb2_grpc.InferenceStub(channel))
        with front.http:
            yield front
    engine.close()


@pytest.fixture(autouse=True)
def nothing_submitted(front: Front) -> None:
    front.engine.submitted.clear()


def check_error(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers["x-request-id"]) == 32
    assert len(response.content) <= MAX_ERROR_BYTES
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"].isprintable()
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")


def post(front: Front, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | (headers or {})
    started = time.process_time()
    response = front.http.post(front.url + path, content=content, headers=headers)
    assert time.process_time() - started < MAX_CPU_S  # client and server share the process
    return response


def grpc_error(front: Front, method: str, request: Any) -> tuple[grpc.StatusCode, pb.Error]:
    """Status of a failing stream and its error event."""
    events = []
    with pytest.raises(grpc.RpcError) as caught:
        for event in getattr(front.stub, method)(request, timeout=TIMEOUT_S):
            events.append(event)
    assert [event.WhichOneof("event") for event in events] == ["error"]
    return caught.value.code(), events[0].error


# ---- fields that both endpoints of both fronts have

MISTYPED = "invalid_type"
TOO_SMALL, TOO_LARGE = "integer_below_min_value", "integer_above_max_value"
BELOW, ABOVE = "decimal_below_min_value", "decimal_above_max_value"
NO_PROTO = "what a proto field of this type cannot hold, or an empty list, which it does not keep"

# row, fields, code, param, why not on gRPC
FIELDS: list[tuple[int, dict[str, Any], str, str, str | None]] = [
    (22, {"model": 5}, MISTYPED, "model", NO_PROTO),
    (31, {"max_tokens": 0}, TOO_SMALL, "max_tokens", None),
    (31, {"max_tokens": -1}, TOO_SMALL, "max_tokens", None),
    (32, {"max_tokens": CONTEXT + 1}, TOO_LARGE, "max_tokens", None),
    (33, {"max_tokens": 1.5}, MISTYPED, "max_tokens", NO_PROTO),
    (33, {"max_tokens": "4"}, MISTYPED, "max_tokens", NO_PROTO),
    (33, {"max_tokens": True}, MISTYPED, "max_tokens", NO_PROTO),
    (33, {"max_tokens": 2**62}, TOO_LARGE, "max_tokens", None),
    (33, {"max_tokens": 2**70}, TOO_LARGE, "max_tokens", NO_PROTO),
    (33, {"max_tokens": 10**4000}, TOO_LARGE, "max_tokens", NO_PROTO),
    (33, {"min_tokens": -1}, TOO_SMALL, "min_tokens", None),
    (33, {"min_tokens": 9, "max_tokens": 8}, TOO_LARGE, "min_tokens", None),
    (34, {"temperature": -0.1}, BELOW, "temperature", None),
    (34, {"temperature": 2.1}, ABOVE, "temperature", None),
    (34, {"temperature": "hot"}, MISTYPED, "temperature", NO_PROTO),
    (34, {"temperature": float("nan")}, "invalid_value", "temperature", None),
    (34, {"temperature": float("inf")}, "invalid_value", "temperature", None),
    (35, {"top_p": 0.0}, BELOW, "top_p", None),
    (35, {"top_p": 1.1}, ABOVE, "top_p", None),
    (35, {"top_k": -2}, TOO_SMALL, "top_k", None),
    (35, {"top_k": 0.5}, MISTYPED, "top_k", NO_PROTO),
    (35, {"min_p": 2.0}, ABOVE, "min_p", None),
    (35, {"min_p": -0.5}, BELOW, "min_p", None),
    (36, {"presence_penalty": 3.0}, ABOVE, "presence_penalty", None),
    (36, {"frequency_penalty": -3.0}, BELOW, "frequency_penalty", None),
    (36, {"repetition_penalty": 0.0}, BELOW, "repetition_penalty", None),
    (37, {"n": 0}, TOO_SMALL, "n", None),
    (37, {"n": -1}, TOO_SMALL, "n", None),
    (37, {"n": 129}, TOO_LARGE, "n", None),
    (37, {"n": 10**9}, TOO_LARGE, "n", None),
    (40, {"seed": "a"}, MISTYPED, "seed", NO_PROTO),
    (40, {"seed": 2**70}, TOO_LARGE, "seed", NO_PROTO),
    (40, {"seed": 2**63}, TOO_LARGE, "seed", NO_PROTO),
    (40, {"seed": -(2**63) - 1}, TOO_SMALL, "seed", NO_PROTO),
    (41, {"stop": list("abcde")}, "array_above_max_length", "stop", None),
    (41, {"stop": ""}, "invalid_value", "stop", NO_PROTO),
    (41, {"stop": ["a", ""]}, "invalid_value", "stop[1]", None),
    (41, {"stop": [1]}, MISTYPED, "stop[0]", NO_PROTO),
    (41, {"stop": 5}, MISTYPED, "stop", NO_PROTO),
    (41, {"stop": ["x" * 257]}, "string_above_max_length", "stop[0]", None),
    (41, {"stop": ["x" * 100_000]}, "string_above_max_length", "stop[0]", None),
    (43, {"logit_bias": {"abc": 1.0}}, "invalid_value", "logit_bias", NO_PROTO),
    (43, {"logit_bias": {"-1": 1.0}}, "invalid_value", "logit_bias", NO_PROTO),
    (43, {"logit_bias": {str(VOCAB_SIZE): 1.0}}, "invalid_value", "logit_bias", None),
    (43, {"logit_bias": {"7": 1000.0}}, ABOVE, "logit_bias.7", None),
    (43, {"logit_bias": {"7": float("nan")}}, "invalid_value", "logit_bias.7", None),
    (43, {"logit_bias": {"7": "x"}}, MISTYPED, "logit_bias.7", NO_PROTO),
    (43, {"logit_bias": {"7": True}}, MISTYPED, "logit_bias.7", NO_PROTO),
    (
        43,
        {"logit_bias": dict.fromkeys(map(str, range(100_000)), 1.0)},
        "array_above_max_length",
        "logit_bias",
        None,
    ),
    (44, {"stop_token_ids": [3, VOCAB_SIZE]}, "invalid_value", "stop_token_ids[1]", None),
    (44, {"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids[0]", NO_PROTO),
    (44, {"stop_token_ids": ["a"]}, MISTYPED, "stop_token_ids[0]", NO_PROTO),
    (44, {"stop_token_ids": [1] * 129}, "array_above_max_length", "stop_token_ids", None),
    (44, {"allowed_token_ids": [VOCAB_SIZE]}, "invalid_value", "allowed_token_ids[0]", None),
    (44, {"allowed_token_ids": []}, "empty_array", "allowed_token_ids", NO_PROTO),
    (45, {"stream": "yes"}, MISTYPED, "stream", NO_PROTO),
    (45, {"stream_options": {}}, "invalid_value", "stream_options", NO_PROTO),
    (45, {"stream_options": 5, "stream": True}, MISTYPED, "stream_options", NO_PROTO),
    (46, {"user": 5}, MISTYPED, "user", NO_PROTO),
    (46, {"user": "u" * 513}, "string_above_max_length", "user", None),
    (
        46,
        {"metadata": {f"k{i}": "v" for i in range(100)}},
        "array_above_max_length",
        "metadata",
        None,
    ),
    (46, {"metadata": {"k": 1}}, MISTYPED, "metadata.k", NO_PROTO),
    (46, {"metadata": {"k": "v" * 513}}, "string_above_max_length", "metadata.k", None),
    (46, {"metadata": {"k" * 65: "v"}}, "string_above_max_length", "metadata", None),
    (46, {"cache_salt": 5}, MISTYPED, "cache_salt", NO_PROTO),
    (46, {"cache_salt": ""}, "invalid_value", "cache_salt", None),
    (46, {"cache_salt": "s" * 129}, "string_above_max_length", "cache_salt", None),
    (64, {"timeout": -1.0}, BELOW, "timeout", None),
    (64, {"timeout": 1e9}, ABOVE, "timeout", None),
]
IDS = [f"{row}-{json.dumps(fields)[:40]}" for row, fields, *_ in FIELDS]
MESSAGE_FIELDS = {"model", "user", "metadata", "timeout", "cache_salt"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("row", "fields", "code", "param", "_"), FIELDS, ids=IDS)
def test_field_on_http(
    front: Front, path: str, row: int, fields: Any, code: str, param: str, _: Any
) -> None:
    body = json.dumps((CHAT_BODY if path == CHAT else TEXT_BODY) | fields)
    if "NaN" in body or "Infinity" in body:  # JSON cannot say it: see row 34 among the bodies
        body = body.replace("NaN", "1e999").replace("Infinity", "1e999")
    check_error(post(front, path, body.encode()), 400, code, param)
    assert front.engine.submitted == []


@pytest.mark.parametrize("method", ["Chat", "Generate"])
@pytest.mark.parametrize(
    ("row", "fields", "code", "param"),
    [case[:4] for case in FIELDS if case[4] is None],
    ids=[name for name, case in zip(IDS, FIELDS, strict=True) if case[4] is None],
)
def test_field_on_grpc(
    front: Front, method: str, row: int, fields: Any, code: str, param: str
) -> None:
    outer = {name: value for name, value in fields.items() if name in MESSAGE_FIELDS}
    inner = {name: value for name, value in fields.items() if name not in MESSAGE_FIELDS}
    if "logit_bias" in inner:
        inner["logit_bias"] = {int(k): v for k, v in inner["logit_bias"].items()}
    sampling = pb.SamplingParams(**inner)
    request: Any = pb.GenerateRequest(text="Hi", sampling=sampling, **outer)
    if method == "Chat":
        messages = [pb.ChatMessage(**USER)]
        request = pb.ChatRequest(messages=messages, sampling=sampling, **outer)
    status, error = grpc_error(front, method, request)
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.code, error.param) == (code, param)
    assert front.engine.submitted == []


# ---- conversations

TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

# row, messages, code, param
CONVERSATIONS: list[tuple[int, Any, str, str]] = [
    (23, "Hi", MISTYPED, "messages"),
    (23, {"role": "user"}, MISTYPED, "messages"),
    (23, ["Hi"], MISTYPED, "messages[0]"),
    (23, [{"content": "Hi"}], "missing_required_parameter", "messages[0].role"),
    (23, [{"role": "user"}], "missing_required_parameter", "messages[0].content"),
    (24, [], "empty_array", "messages"),
    (24, [USER] * 2049, "array_above_max_length", "messages"),
    (25, [{"role": "alien", "content": "x"}], "invalid_value", "messages[0].role"),
    (26, [USER, {"role": "user", "content": None}], MISTYPED, "messages[1].content"),
    (26, [{"role": "user", "content": 5}], MISTYPED, "messages[0].content"),
    (26, [{"role": "user", "content": {"text": "x"}}], MISTYPED, "messages[0].content"),
    (26, [{"role": "user", "content": []}], "empty_array", "messages[0].content"),
    (26, [{"role": "user", "content": [5]}], MISTYPED, "messages[0].content[0]"),
    (26, [{"role": "assistant", "content": None}], MISTYPED, "messages[0].content"),
    (26, [USER | {"name": "n" * 65}], "string_above_max_length", "messages[0].name"),
    (
        27,
        [{"role": "user", "content": [{"type": "hologram"}]}],
        "unsupported_content_type",
        "messages[0].content[0].type",
    ),
    (
        27,
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what is this?"},
                    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/x"}},
                ],
            }
        ],
        "unsupported_content_type",
        "messages[0].content[1].type",
    ),
    (
        27,
        [{"role": "user", "content": [{"type": "text"}]}],
        "missing_required_parameter",
        "messages[0].content[0].text",
    ),
    (
        28,
        [USER, {"role": "tool", "content": "x"}],
        "missing_required_parameter",
        "messages[1].tool_call_id",
    ),
    (
        28,
        [USER, {"role": "tool", "content": "x", "tool_call_id": "c9"}],
        "invalid_value",
        "messages[1].tool_call_id",
    ),
    (28, [USER | {"tool_calls": [TOOL_CALL]}], "invalid_value", "messages[0].tool_calls"),
    (
        30,
        [{"role": "user", "content": "x" * CONTEXT}],
        "context_length_exceeded",
        "messages",
    ),
    (
        30,
        [{"role": "user", "content": "x" * 1_000_000}],
        "context_length_exceeded",
        "messages",
    ),
]


@pytest.mark.parametrize(("row", "messages", "code", "param"), CONVERSATIONS)
def test_conversation_on_http(front: Front, row: int, messages: Any, code: str, param: str) -> None:
    response = post(front, CHAT, {"messages": messages})
    check_error(response, 400, code, param)
    if row == 30:
        assert f"maximum context length is {CONTEXT} tokens" in response.json()["error"]["message"]
    assert front.engine.submitted == []


@pytest.mark.parametrize(
    ("row", "messages", "code", "param"),
    [
        (24, [], "empty_array", "messages"),
        (25, [pb.ChatMessage(role="alien", content="x")], "invalid_value", "messages[0].role"),
        (25, [pb.ChatMessage(content="x")], "invalid_value", "messages[0].role"),
        (
            26,
            [pb.ChatMessage(role="user")],
            "missing_required_parameter",
            "messages[0].content",
        ),
        (
            28,
            [pb.ChatMessage(role="tool", content="x")],
            "missing_required_parameter",
            "messages[0].tool_call_id",
        ),
        (
            30,
            [pb.ChatMessage(role="user", content="x" * CONTEXT)],
            "context_length_exceeded",
            "messages",
        ),
        (
            30,
            [pb.ChatMessage(role="user", content="x" * 1_000_000)],
            "context_length_exceeded",
            "messages",
        ),
    ],
)
def test_conversation_on_grpc(
    front: Front, row: int, messages: list[pb.ChatMessage], code: str, param: str
) -> None:
    status, error = grpc_error(front, "Chat", pb.ChatRequest(messages=messages))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.code, error.param) == (code, param)


# ---- what only one endpoint has

LONG = "context_length_exceeded"

# row, path, fields on top of a good body, status, code, param
ENDPOINT_FIELDS: list[tuple[int, str, dict[str, Any], int, str, str]] = [
    (20, CHAT, {"model": "tinny"}, 404, "model_not_found", "model"),
    (20, COMPLETIONS, {"model": "x" * 100_000}, 404, "model_not_found", "model"),
    (31, CHAT, {"max_completion_tokens": 0}, 400, TOO_SMALL, "max_completion_tokens"),
    (39, COMPLETIONS, {"best_of": 1000}, 400, "unsupported_parameter", "best_of"),
    (39, COMPLETIONS, {"suffix": "x"}, 400, "unsupported_parameter", "suffix"),
    (42, CHAT, {"top_logprobs": 5}, 400, "invalid_value", "top_logprobs"),
    (42, CHAT, {"logprobs": True, "top_logprobs": 21}, 400, TOO_LARGE, "top_logprobs"),
    (42, CHAT, {"logprobs": True, "top_logprobs": -1}, 400, TOO_SMALL, "top_logprobs"),
    (42, CHAT, {"logprobs": 5}, 400, MISTYPED, "logprobs"),
    (42, COMPLETIONS, {"logprobs": 100}, 400, TOO_LARGE, "logprobs"),
    (42, COMPLETIONS, {"logprobs": -2}, 400, TOO_SMALL, "logprobs"),
    (47, CHAT, {"response_format": {"type": "xml"}}, 400, "unsupported_parameter",
     "response_format"),
    (47, CHAT, {"response_format": {"type": "json_schema"}}, 400, "unsupported_parameter",
     "response_format"),
    (55, CHAT, {"tools": []}, 400, "unsupported_parameter", "tools"),
    (55, CHAT, {"tool_choice": "auto"}, 400, "unsupported_parameter", "tool_choice"),
    (56, CHAT, {"chat_template": "{{ 1 }}"}, 400, "unsupported_parameter", "chat_template"),
    (56, CHAT, {"chat_template_kwargs": {"tokenize": True}}, 400, "invalid_value",
     "chat_template_kwargs"),
    (56, CHAT, {"chat_template_kwargs": {"thinking": "yes"}}, 400, MISTYPED,
     "chat_template_kwargs.thinking"),
    (57, COMPLETIONS, {"prompt": None}, 400, "missing_required_parameter", "prompt"),
    (57, COMPLETIONS, {"prompt": ""}, 400, "invalid_value", "prompt"),
    (57, COMPLETIONS, {"prompt": []}, 400, "empty_array", "prompt"),
    (57, COMPLETIONS, {"prompt": ["a", ""]}, 400, "invalid_value", "prompt[1]"),
    (57, COMPLETIONS, {"prompt": [[]]}, 400, "empty_array", "prompt[0]"),
    (57, COMPLETIONS, {"prompt": 5}, 400, MISTYPED, "prompt"),
    (58, COMPLETIONS, {"prompt": ["a"] * 257}, 400, "array_above_max_length", "prompt"),
    (58, COMPLETIONS, {"prompt": [[1]] * 2000}, 400, "array_above_max_length", "prompt"),
    (58, COMPLETIONS, {"prompt": ["a"] * 100, "n": 3}, 400, "invalid_value", "n"),
    (59, COMPLETIONS, {"prompt": [5] * 1_000_000}, 400, LONG, "prompt"),
    (59, COMPLETIONS, {"prompt": [5, -5]}, 400, "invalid_value", "prompt[1]"),
    (59, COMPLETIONS, {"prompt": [5, VOCAB_SIZE]}, 400, "invalid_value", "prompt[1]"),
    (59, COMPLETIONS, {"prompt": [5, "a"]}, 400, MISTYPED, "prompt[1]"),
    (59, COMPLETIONS, {"prompt": ["a", 5]}, 400, MISTYPED, "prompt[1]"),
    (59, COMPLETIONS, {"prompt": [5, 1.0]}, 400, MISTYPED, "prompt[1]"),
    (59, COMPLETIONS, {"prompt": [True]}, 400, MISTYPED, "prompt[0]"),
    (59, COMPLETIONS, {"prompt": [[5], "a"]}, 400, MISTYPED, "prompt[1]"),
    (59, COMPLETIONS, {"prompt": [[[5]]]}, 400, MISTYPED, "prompt[0][0]"),
    (30, COMPLETIONS, {"prompt": [5] * CONTEXT}, 400, LONG, "prompt"),
    (30, COMPLETIONS, {"prompt": "x" * 1_000_000}, 400, LONG, "prompt"),
    (60, "/detokenize", {"tokens": [10**9]}, 400, "invalid_value", "tokens[0]"),
    (60, "/detokenize", {"tokens": [-1]}, 400, "invalid_value", "tokens[0]"),
    (60, "/detokenize", {"tokens": "5"}, 400, MISTYPED, "tokens"),
    (60, "/detokenize", {}, 400, "missing_required_parameter", "tokens"),
    (60, "/tokenize", {}, 400, "invalid_value", "prompt"),
    (60, "/tokenize", {"prompt": "a", "messages": [USER]}, 400, "invalid_value", "prompt"),
    (60, "/tokenize", {"messages": []}, 400, "empty_array", "messages"),
    (60, "/tokenize", {"prompt": "x" * 1_000_000}, 400, LONG, "prompt"),
    (20, "/tokenize", {"prompt": "a", "model": "nope"}, 404, "model_not_found", "model"),
    (61, CHAT, {"prompt_embeds": "AAAA"}, 400, "unsupported_parameter", "prompt_embeds"),
    (62, CHAT, {"kv_transfer_params": {}}, 403, "insufficient_scope", "kv_transfer_params"),
    (62, CHAT, {"priority": 1}, 403, "insufficient_scope", "priority"),
    (64, CHAT, {"timeout": 0.0}, 504, "deadline_exceeded", None),  # type: ignore[list-item]
]  # fmt: skip


@pytest.mark.parametrize(("row", "path", "fields", "status", "code", "param"), ENDPOINT_FIELDS)
def test_field_of_one_endpoint(
    front: Front, row: int, path: str, fields: Any, status: int, code: str, param: str
) -> None:
    base = {CHAT: CHAT_BODY, COMPLETIONS: TEXT_BODY}.get(path, {})
    check_error(post(front, path, base | fields), status, code, param)
    assert front.engine.submitted == []


@pytest.mark.parametrize(
    ("row", "request_", "code", "param"),
    [
        (20, pb.GenerateRequest(text="Hi", model="nope"), "model_not_found", "model"),
        (42, pb.GenerateRequest(text="Hi", sampling={"logprobs": 100}), TOO_LARGE, "logprobs"),
        (42, pb.GenerateRequest(text="Hi", sampling={"logprobs": -2}), TOO_SMALL, "logprobs"),
        (57, pb.GenerateRequest(), "missing_required_parameter", "prompt"),
        (57, pb.GenerateRequest(text=""), "invalid_value", "prompt"),
        (57, pb.GenerateRequest(token_ids={"ids": []}), "empty_array", "prompt"),
        (59, pb.GenerateRequest(token_ids={"ids": [5, VOCAB_SIZE]}), "invalid_value", "prompt[1]"),
        (59, pb.GenerateRequest(token_ids={"ids": [5] * 1_000_000}), LONG, "prompt"),
        (30, pb.GenerateRequest(token_ids={"ids": [5] * CONTEXT}), LONG, "prompt"),
        (64, pb.GenerateRequest(text="Hi", timeout=0.0), "deadline_exceeded", ""),
    ],
)
def test_generate_on_grpc(
    front: Front, row: int, request_: pb.GenerateRequest, code: str, param: str
) -> None:
    status, error = grpc_error(front, "Generate", request_)
    expected = {20: grpc.StatusCode.NOT_FOUND, 64: grpc.StatusCode.DEADLINE_EXCEEDED}
    assert status is expected.get(row, grpc.StatusCode.INVALID_ARGUMENT)
    assert (error.code, error.param) == (code, param)
    assert front.engine.submitted == []


# ---- bodies

# row, body, code, param
BODIES: list[tuple[int, bytes, str, str | None]] = [
    (8, b"", "invalid_json", None),
    (8, b"null", MISTYPED, None),
    (8, b"[]", MISTYPED, None),
    (8, b'"x"', MISTYPED, None),
    (8, b"{}", "missing_required_parameter", "messages"),
    (9, b'{"messages": [', "invalid_json", None),
    (9, b'{"messages": []} x', "invalid_json", None),
    (9, b'{"n": 1' + b"0" * 5000 + b"}", "invalid_json", None),
    (10, b'{"messages": "\xff"}', "invalid_utf8", None),
    (10, json.dumps(CHAT_BODY).encode("utf-16"), "invalid_utf8", None),
    (
        11,
        b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}',
        "invalid_unicode",
        "messages[0].content",
    ),
    (11, b'{"\\uD800": 1}', "invalid_unicode", None),
    (13, b'{"n": 1, "n": 2}', "duplicate_key", "n"),
    (13, b'{"messages": [{"role": "user", "role": "system"}]}', "duplicate_key", "role"),
    (14, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep", None),
    (14, b"[" * 100_000, "too_deep", None),
    (14, b'{"a":' * 65 + b"1" + b"}" * 65, "too_deep", None),
    (34, b'{"messages": [], "temperature": NaN}', "invalid_json", None),
    (34, b'{"messages": [], "temperature": -Infinity}', "invalid_json", None),
    (43, b'{"logit_bias": {"1": 1, "1": 2}}', "duplicate_key", "1"),
]


@pytest.mark.parametrize(("row", "body", "code", "param"), BODIES)
def test_body(front: Front, row: int, body: bytes, code: str, param: str | None) -> None:
    check_error(post(front, CHAT, body), 400, code, param)


def test_error_tells_the_byte(front: Front) -> None:
    message = post(front, CHAT, '{"é": x}'.encode()).json()["error"]["message"]
    assert "at byte 7" in message


def test_depth_at_the_limit_and_brackets_in_strings_are_fine(front: Front) -> None:
    deep = b"[" * 63 + b"]" * 63
    body = b'{"prompt": "[[\\"[[", "x": ' + deep + b', "y": "' + b"[" * 1000 + b'"}'
    response = post(front, COMPLETIONS, body)
    assert response.status_code == 200
    assert response.headers["x-ignored-params"] == "x, y"


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", ""])
def test_row_7_content_type(front: Front, kind: str) -> None:
    response = post(front, CHAT, CHAT_BODY, {"Content-Type": kind})
    check_error(response, 415, "unsupported_media_type", None)


def test_row_7_charset_is_fine(front: Front) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert post(front, CHAT, CHAT_BODY, headers).status_code == 200


def test_row_15_large_body_is_refused_by_length_and_by_count(front: Front) -> None:
    body = b'{"x": "' + b"x" * 2**23 + b'"}'
    check_error(post(front, CHAT, body), 413, "request_too_large", None)
    chunks = (body[i : i + 2**16] for i in range(0, len(body), 2**16))
    response = front.http.post(
        front.url + CHAT, content=chunks, headers={"Content-Type": "application/json"}
    )
    check_error(response, 413, "request_too_large", None)


def test_row_15_large_message_on_grpc(front: Front) -> None:
    """Past 4 MiB grpc itself refuses; a message of less text but too many bytes, our own check."""
    with pytest.raises(grpc.RpcError) as caught:
        list(front.stub.Generate(pb.GenerateRequest(text="x" * 2**23), timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_row_15_own_check_on_grpc(tmp_path: Any) -> None:
    engine = FakeEngine([EOS])
    service = make_service(tmp_path, engine, Limits(max_body_bytes=1000))
    with grpc_server(service) as address, grpc.insecure_channel(address) as channel:
        front = Front(engine, "", inference_pb2_grpc.InferenceStub(channel))
        status, error = grpc_error(front, "Generate", pb.GenerateRequest(text="x" * 1000))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.code == "request_too_large"


def test_row_16_compressed_body(front: Front) -> None:
    response = post(front, CHAT, CHAT_BODY, {"Content-Encoding": "gzip"})
    check_error(response, 415, "unsupported_content_encoding", None)


def test_row_17_headers(front: Front) -> None:
    many = {f"x-{i}": "v" for i in range(300)}
    check_error(post(front, CHAT, CHAT_BODY, many), 431, "headers_too_large", None)


# ---- paths


@pytest.mark.parametrize("path", ["/nope", "/v1/chat/completions/", "//v1/models", "/V1/models"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_row_6_unknown_path(front: Front, path: str, method: str) -> None:
    check_error(front.http.request(method, front.url + path), 404, "unknown_url", None)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET"), ("POST", "/readyz", "GET")],
)
def test_row_6_wrong_method(front: Front, method: str, path: str, allow: str) -> None:
    response = front.http.request(method, front.url + path)
    check_error(response, 405, "method_not_allowed", None)
    assert response.headers["allow"] == allow


def test_long_path_makes_no_long_error(front: Front) -> None:
    check_error(front.http.get(front.url + "/" + "x" * 30_000), 404, "unknown_url", None)


@pytest.mark.parametrize(
    ("row", "data"),
    [
        (17, b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 262_144 + b"\r\n\r\n"),
        (18, b"\x00\x01\x02garbage\r\n\r\n"),
        (18, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        (18, b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n"),
        (
            18,
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
    ],
)
def test_bytes_that_are_no_request(front: Front, row: int, data: bytes) -> None:
    """The HTTP library's own answers (400), and ours where it lets the request through (431)."""
    parts = urlsplit(front.url)
    with socket.create_connection((parts.hostname, parts.port), TIMEOUT_S) as connection:
        connection.sendall(data)
        status_line = connection.makefile("rb").readline()
    assert status_line.split(b" ")[1] in (b"400", b"431"), status_line


def test_row_19_slow_body(tmp_path: Any) -> None:
    service = make_service(tmp_path, FakeEngine([EOS]), Limits(max_body_s=0.1))
    with http_server(service) as url:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), TIMEOUT_S) as connection:
            connection.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 50\r\n\r\n{"
            )
            head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "request_timeout"


# ---- whatever comes, the answer is no fault of the server

_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 600), st.text(max_size=3), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=3), st.one_of(st.floats(), st.text(max_size=2)), max_size=3),
)


def _outcome(service: InferenceService, start: Any, schema: Any, data: Any) -> int:
    """HTTP status that this body would get."""

    async def go() -> None:
        with closing(await start(parse_body(schema, data))) as generation:
            async for _ in generation:
                pass

    try:
        asyncio.run(asyncio.wait_for(go(), TIMEOUT_S))
    except ShoalError as error:
        assert error.message.isprintable()
        return kind_of(error).http_status
    finally:
        assert service.num_open_sequences == 0
    return 200


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> InferenceService:
    engine = FakeEngine([*ids_of("ok"), EOS])
    return make_service(tmp_path_factory.mktemp("alone"), engine, Limits(max_choices=4))


@pytest.mark.parametrize("schema", [ChatCompletionRequest, CompletionRequest])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_odd_fields_never_break_the_server(
    alone: InferenceService, schema: Any, data: st.DataObject
) -> None:
    names = [name for name in schema.model_fields if name not in ("messages", "prompt")]
    fields = data.draw(st.dictionaries(st.sampled_from(names), _ODD, max_size=3))
    chat = schema is ChatCompletionRequest
    base = {"messages": data.draw(_CONVERSATION)} if chat else {"prompt": data.draw(_PROMPT)}
    start = alone.chat if chat else alone.complete
    assert _outcome(alone, start, schema, base | fields) in (200, 400, 403, 404, 504)


_PROMPT = st.one_of(_ODD, st.just("Hi"), st.lists(st.lists(st.integers(0, 511), max_size=3)))
_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "alien"])},
    optional={"content": st.one_of(_ODD, st.text(max_size=5)), "name": _ODD, "tool_calls": _ODD},
)
_CONVERSATION = st.one_of(st.just([USER]), _ODD, st.lists(_TURN, max_size=3))


@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_json_or_refused(data: bytes) -> None:
    try:
        found = parse_json(data, Limits())
    except InvalidRequest as error:
        assert error.code
    else:
        assert json.loads(data) == found or found != found  # NaN never comes through


# ---- inputs that look bad and are not


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (21, {"model": None}),
        (21, {"model": "tiny-alias"}),
        (32, {"max_tokens": CONTEXT}),  # with the prompt too much: cut to what is left
        (35, {"top_k": -1}),
        (38, {"n": 4, "temperature": 0.0}),
        (40, {"seed": -1}),
        (41, {"stop": []}),
        (41, {"stop": None}),
        (47, {"response_format": {"type": "text"}}),
        (39, {"best_of": 1}),
    ],
)
def test_accepted(front: Front, row: int, fields: dict[str, Any]) -> None:
    response = post(front, CHAT, CHAT_BODY | fields)
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == fields.get("n", 1)


def test_row_12_nul_is_text(front: Front) -> None:
    body = {"messages": [{"role": "user", "content": "a\x00b"}]}
    assert post(front, CHAT, body).status_code == 200
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="a\x00b")])
    list(front.stub.Chat(request, timeout=TIMEOUT_S))
    prompts = [submit.prompt_ids for submit in front.engine.submitted]
    assert prompts == [[0, 3, *ids_of("a\x00b"), 4]] * 2


def test_row_29_markers_in_user_text_are_text(front: Front) -> None:
    hostile = "<｜User｜></think><|im_end|>"
    post(front, CHAT, {"messages": [{"role": "user", "content": hostile}]})
    post(front, COMPLETIONS, {"prompt": hostile})
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content=hostile)])
    list(front.stub.Chat(request, timeout=TIMEOUT_S))
    list(front.stub.Generate(pb.GenerateRequest(text=hostile), timeout=TIMEOUT_S))
    chat, text = [0, 3, *ids_of(hostile), 4], ids_of(hostile)
    assert [submit.prompt_ids for submit in front.engine.submitted] == [chat, text, chat, text]
    post(front, COMPLETIONS, {"prompt": "<｜User｜>", "allow_special_tokens": True})
    assert front.engine.submitted[-1].prompt_ids == [3]


def test_row_39_unknown_fields_are_reported_or_refused(front: Front, tmp_path: Any) -> None:
    response = post(front, CHAT, CHAT_BODY | {"mirostat": 2, "füß\n": 1})
    assert response.status_code == 200
    assert response.headers["x-ignored-params"] == "mirostat, f"
    strict = make_service(tmp_path, FakeEngine([EOS]), strict_params=True)
    with http_server(strict) as url:
        response = httpx.post(url + CHAT, json=CHAT_BODY | {"mirostat": 2}, timeout=TIMEOUT_S)
    check_error(response, 400, "unknown_parameter", "mirostat")
