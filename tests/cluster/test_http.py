"""The HTTP API: routes, whole answers through the openai SDK, request ids, states."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.frontend.backend import Readiness
from cluster.frontend.http_server import build_app
from cluster.frontend.limits import Limits
from cluster.frontend.service import InferenceService
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import CONTEXT, EOS, http_server, ids_of, make_service

HELLO = [*ids_of("Hello 漢字!"), EOS]
CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


class Served:
    def __init__(self, engine: FakeEngine, service: InferenceService, url: str) -> None:
        self.engine, self.service, self.url = engine, service, url
        self.sdk = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=TIMEOUT_S)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=headers, timeout=TIMEOUT_S)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """`serve(engine, limits)`: a Served that is taken down after the test."""
    with ExitStack() as stack:

        def start(engine: FakeEngine | None = None, limits: Limits | None = None) -> Served:
            engine = engine or FakeEngine(HELLO, cached=3)
            service = make_service(tmp_path, engine, limits, system_fingerprint="fp_1")
            url = stack.enter_context(http_server(service))
            stack.callback(engine.close)
            served = Served(engine, service, url)
            stack.enter_context(served.sdk)
            return served

        yield start


# ---- whole answers


def test_chat_answer(serve: Callable[..., Served]) -> None:
    answer = serve().sdk.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.system_fingerprint == "fp_1"
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello 漢字!")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == len(HELLO)
    assert answer.usage.total_tokens == 5 + len(HELLO)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_chat_log_probabilities(serve: Callable[..., Served]) -> None:
    answer = serve().sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    spelled = b"".join(bytes(token.bytes or []) for token in found.content)
    assert spelled.decode() == answer.choices[0].message.content
    first = found.content[0]
    assert (first.token, first.bytes, first.logprob) == ("H", [72], -0.89)
    assert [top.token for top in first.top_logprobs] == ["H", "I", "J"]
    assert found.content[-1].token == "<｜end▁of▁sentence｜>"  # one entry a sampled token


def test_completion_answer_as_lm_eval_reads_it(serve: Callable[..., Served]) -> None:
    """echo, logprobs and token-id prompts: a log probability for every id of the prompt."""
    answer = serve().sdk.completions.create(
        model="tiny", prompt=[ids_of("ab"), ids_of("c")], echo=True, logprobs=1, max_tokens=1
    )
    assert [choice.text for choice in answer.choices] == ["abH", "cH"]
    first = answer.choices[0].logprobs
    assert first is not None
    assert first.tokens == ["a", "b", "H"]
    assert first.token_logprobs is not None
    assert first.token_logprobs[1:] == [-ids_of("b")[0] / 100, -0.89]
    assert first.token_logprobs[0] is None
    assert first.top_logprobs is not None and first.top_logprobs[2] == {"H": -0.89}
    assert first.text_offset == [0, 1, 2]
    assert answer.usage is not None and answer.usage.prompt_tokens == 3


def test_token_ids_if_asked(serve: Callable[..., Served]) -> None:
    body = {"messages": MESSAGES, "return_token_ids": True}
    choice = serve().post(CHAT, body).json()["choices"][0]
    assert choice["token_ids"] == HELLO
    assert choice["prompt_token_ids"] == [0, 3, *ids_of("Hi"), 4]


def test_stop_reason_is_told(serve: Callable[..., Served]) -> None:
    served = serve()
    choice = served.post(CHAT, {"messages": MESSAGES, "stop": "o"}).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Hell", "o")
    choice = served.post(CHAT, {"messages": MESSAGES}).json()["choices"][0]
    assert choice["stop_reason"] is None


def test_n_greedy_choices_are_equal(serve: Callable[..., Served]) -> None:
    answer = serve().sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, n=4, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) == 1


def test_text_parts_are_joined(serve: Callable[..., Served]) -> None:
    served = serve()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    served.post(CHAT, {"messages": [{"role": "user", "content": parts}]})
    assert served.engine.submitted[0].prompt_ids == [0, 3, *ids_of("a\nb"), 4]


# ---- errors through the SDK


def test_sdk_raises_its_own_errors(serve: Callable[..., Served]) -> None:
    sdk = serve().sdk
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert (bad.value.param, bad.value.code) == ("temperature", "decimal_above_max_value")
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("gpt")


def test_overload_is_503_with_retry_after(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine(HELLO, hold_after=1), Limits(max_open_sequences=1))
    body = {"messages": MESSAGES, "stream": True}
    with httpx.stream("POST", served.url + CHAT, json=body, timeout=TIMEOUT_S) as first:
        assert first.status_code == 200
        refused = served.post(CHAT, {"messages": MESSAGES})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "server_overloaded"
    assert int(refused.headers["retry-after"]) >= 1


def test_timeout_header_is_504(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine(HELLO, hold_after=1))
    late = served.post(CHAT, {"messages": MESSAGES}, **{"X-Request-Timeout": "0.1"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert served.engine.wait_for(lambda: len(served.engine.aborted) == 1)
    for bad in ("soon", "nan", "-1"):
        refused = served.post(CHAT, {"messages": MESSAGES}, **{"X-Request-Timeout": bad})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "timeout")


def test_unforeseen_fault_is_500_and_silent_about_itself(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()
    served.service.tokenizer.apply_chat_template = None  # type: ignore[method-assign, assignment]
    response = served.post(CHAT, {"messages": MESSAGES}, **{"X-Request-Id": "r-7"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "NoneType" not in response.text
    assert response.headers["x-request-id"] == "r-7"
    assert "request r-7 failed" in caplog.text


# ---- request ids


@pytest.mark.parametrize(
    ("given", "echoed"),
    [("abc-1.2:3_D", "abc-1.2:3_D"), ('a b"<script>;é', "abscript"), ("x" * 500, "x" * 128)],
)
def test_request_id_is_echoed_clean(serve: Callable[..., Served], given: str, echoed: str) -> None:
    response = httpx.get(serve().url + "/livez", headers={"X-Request-Id": given.encode("latin-1")})
    assert response.headers["x-request-id"] == echoed


def test_request_id_is_left_to_a_proxy_that_makes_it(serve: Callable[..., Served]) -> None:
    app = build_app(serve().service, echo_request_id=False)
    transport = httpx.ASGITransport(app)

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/livez", headers={"X-Request-Id": "a"})

    assert "x-request-id" not in asyncio.run(go()).headers


# ---- other routes


def test_models(serve: Callable[..., Served]) -> None:
    sdk = serve().sdk
    assert [model.id for model in sdk.models.list()] == ["tiny", "tiny-alias"]
    model = sdk.models.retrieve("tiny").model_dump()
    assert (model["object"], model["owned_by"], model["max_model_len"]) == (
        "model",
        "shoal",
        CONTEXT,
    )


def test_model_name_in_the_answer_is_the_one_asked_for(serve: Callable[..., Served]) -> None:
    served = serve()
    for name in ("tiny", "tiny-alias"):
        assert served.post(CHAT, {"messages": MESSAGES, "model": name}).json()["model"] == name
    assert served.post(CHAT, {"messages": MESSAGES}).json()["model"] == "tiny"


def test_tokenize_and_detokenize(serve: Callable[..., Served]) -> None:
    served = serve()
    assert served.post("/tokenize", {"prompt": "aé"}).json() == {
        "count": 3,
        "max_model_len": CONTEXT,
        "tokens": ids_of("aé"),
    }
    chat = served.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False})
    assert chat.json()["tokens"] == [0, 3, *ids_of("Hi")]
    assert served.post("/detokenize", {"tokens": HELLO}).json() == {
        "prompt": "Hello 漢字!<｜end▁of▁sentence｜>"
    }
    shown = served.post("/detokenize", {"tokens": HELLO, "skip_special_tokens": True})
    assert shown.json() == {"prompt": "Hello 漢字!"}


def test_ready_only_when_the_engine_is(serve: Callable[..., Served]) -> None:
    served = serve()
    assert served.get("/readyz").json() == {"status": "ok", "stage": "ready", "done": 0, "total": 0}
    served.engine.readiness = Readiness(False, "loading weights", 3, 8)
    for path in ("/readyz", "/health"):
        response = served.get(path)
        assert response.status_code == 503
        assert response.json() == {
            "status": "loading",
            "stage": "loading weights",
            "done": 3,
            "total": 8,
        }
    assert served.get("/livez").status_code == 200
    refused = served.post(CHAT, {"messages": MESSAGES})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_loading"
    assert refused.headers["retry-after"] == "5"


def test_limits_and_version(serve: Callable[..., Served]) -> None:
    served = serve()
    limits = served.get("/v1/limits").json()
    assert limits["max_context_tokens"] == CONTEXT
    assert {k: limits[k] for k in Limits().as_dict()} == Limits().as_dict()
    assert set(served.get("/version").json()) == {"version"}


def test_openapi_describes_every_body(serve: Callable[..., Served]) -> None:
    document = serve().get("/openapi.json").json()
    posts = [route["post"] for route in document["paths"].values() if "post" in route]
    assert len(posts) == 4
    references = [word for word in json.dumps(document).split('"') if word.startswith("#/")]
    for reference in references:
        node: Any = document
        for part in reference[2:].split("/"):
            node = node[part]
    bodies = [post["requestBody"]["content"]["application/json"]["schema"] for post in posts]
    names = {body["$ref"].rpartition("/")[2] for body in bodies}
    assert names == {
        "ChatCompletionRequest",
        "CompletionRequest",
        "TokenizeRequest",
        "DetokenizeRequest",
    }
