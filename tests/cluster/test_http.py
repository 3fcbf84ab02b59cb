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

from cluster.errors import IdempotencyConflict
from cluster.frontend.backend import Readiness
from cluster.frontend.http_server import build_app
from cluster.frontend.idempotency import IdempotentCall, KeyStore
from cluster.frontend.openai import ChatCompletionRequest, CompletionRequest
from cluster.frontend.schema_errors import parse_body
from cluster.frontend.service import InferenceService
from cluster.limits import Limits
from tests.fakes import TIMEOUT_S, FakeEngine, TokenClock
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

        def start(
            engine: FakeEngine | None = None, limits: Limits | None = None, **options: Any
        ) -> Served:
            engine = engine or FakeEngine(HELLO, cached=3)
            service = make_service(tmp_path, engine, limits, system_fingerprint="fp_1", **options)
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
    clock = TokenClock(1, leap_s=0.1)
    served = serve(FakeEngine(HELLO, hold_after=1), clock=clock, observers=[clock])
    late = served.post(CHAT, {"messages": MESSAGES}, **{"X-Request-Timeout": "0.1"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert served.engine.wait_for(lambda: len(served.engine.aborted) == 1)
    for bad in ("soon", "nan", "-1"):
        refused = served.post(CHAT, {"messages": MESSAGES}, **{"X-Request-Timeout": bad})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "timeout")


def test_experts_that_stay_away_are_503(serve: Callable[..., Served]) -> None:
    text = "layer 3 has no expert 7"
    served = serve(FakeEngine(HELLO, finish="unavailable", error=text))
    refused = served.post(CHAT, {"messages": MESSAGES})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("experts_unavailable", "server_error")
    assert text in error["message"]
    assert served.service.num_open_sequences == 0


def test_a_deadline_that_the_experts_missed_is_503(serve: Callable[..., Served]) -> None:
    clock = TokenClock(1, leap_s=0.1)
    served = serve(FakeEngine(HELLO, hold_after=1), clock=clock, observers=[clock])
    served.engine.readiness = Readiness(True, "loading experts 3/8", missing="experts")
    late = served.post(CHAT, {"messages": MESSAGES, "timeout": 0.1})
    assert (late.status_code, late.json()["error"]["code"]) == (503, "experts_unavailable")


# ---- experts left out


def test_answers_say_that_experts_were_left_out(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine(HELLO, renormalised={3}))
    response = served.post(CHAT, {"messages": MESSAGES})
    assert response.json()["renormalised"] is True
    assert response.headers["x-shoal-renormalised"] == "true"
    answer = served.sdk.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello 漢字!"


def test_answers_say_nothing_about_experts_otherwise(serve: Callable[..., Served]) -> None:
    response = serve().post(CHAT, {"messages": MESSAGES})
    assert "renormalised" not in response.json()
    assert "x-shoal-renormalised" not in response.headers


# ---- idempotency keys

BODY = {"messages": MESSAGES, "temperature": 1.0}


def test_an_equal_request_gets_the_kept_answer(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine(HELLO, cached=3))
    first, again = (served.post(CHAT, BODY, **{"Idempotency-Key": "k 1"}) for _ in range(2))
    assert first.status_code == again.status_code == 200
    assert again.content == first.content
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert len(served.engine.submitted) == 1
    other = served.post(CHAT, BODY, **{"Idempotency-Key": "k 2"})
    assert other.json()["id"] != first.json()["id"]


def test_another_request_with_the_key_is_a_conflict(serve: Callable[..., Served]) -> None:
    served = serve()
    key = {"Idempotency-Key": "k"}
    assert served.post(CHAT, BODY, **key).status_code == 200
    for path, body in ((CHAT, BODY | {"max_tokens": 3}), ("/v1/completions", {"prompt": "Hi"})):
        refused = served.post(path, body, **key)
        assert refused.status_code == 409
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")
    assert len(served.engine.submitted) == 1


def test_a_late_answer_is_never_kept_for_another_request() -> None:
    now_s = [0.0]
    limits = Limits()
    store = KeyStore(limits, lambda: now_s[0])
    first = IdempotentCall("", "k", parse_body(CompletionRequest, {"prompt": "a"}))
    second = IdempotentCall("", "k", parse_body(CompletionRequest, {"prompt": "b"}))
    store.claim(first)
    now_s[0] += limits.idempotency_ttl_s + 1
    store.claim(second)
    store.keep(first, b"of the first")
    assert store.find(second) is None


def test_every_ingress_draws_the_same_from_the_key(serve: Callable[..., Served]) -> None:
    servers = [serve(FakeEngine(HELLO)), serve(FakeEngine(HELLO))]
    for served in servers:
        served.post(CHAT, {**BODY, "n": 2}, **{"Idempotency-Key": "k"})
        served.post(CHAT, {**BODY, "seed": 5}, **{"Idempotency-Key": "k 2"})
        served.post(CHAT, {**BODY, "temperature": 0.0}, **{"Idempotency-Key": "k 3"})
        served.post(CHAT, BODY, **{"Idempotency-Key": "k 4"})
    one, two = ([s.params.seed for s in served.engine.submitted] for served in servers)
    assert one == two
    assert one[1] == one[0] + 1 and one[2:4] == [5, None] and one[4] not in one[:4]


def test_a_stream_is_computed_again_with_the_same_seed(serve: Callable[..., Served]) -> None:
    served = serve()
    for _ in range(2):
        response = served.post(CHAT, {**BODY, "stream": True}, **{"Idempotency-Key": "k"})
        assert response.text.endswith("data: [DONE]\n\n")
    first, again = served.engine.submitted
    assert first.params == again.params and first.request_id != again.request_id


def test_refused_and_failed_requests_keep_no_answer(serve: Callable[..., Served]) -> None:
    """A body that is refused does not take the key; one that failed may be sent again."""
    served = serve(FakeEngine(HELLO, finish="error", error="out of cache"))
    key = {"Idempotency-Key": "k"}
    assert served.post(CHAT, BODY | {"temperature": 9}, **key).status_code == 400
    assert served.post(CHAT, BODY, **key).status_code == 500
    served.engine.finish = "stop"
    assert served.post(CHAT, BODY, **key).status_code == 200


@pytest.mark.parametrize("key", ["", "k" * 256, "k\u00e9", "a\tb"])
def test_keys_are_short_printable_ascii(serve: Callable[..., Served], key: str) -> None:
    served = serve()
    headers = {"Idempotency-Key": key.encode("latin-1")}
    refused = httpx.post(served.url + CHAT, json=BODY, headers=headers, timeout=TIMEOUT_S)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "Idempotency-Key"
    assert served.engine.submitted == []


def call(key: str, content: str = "Hi") -> IdempotentCall:
    body = {"messages": [{"role": "user", "content": content}]}
    return IdempotentCall("", key, parse_body(ChatCompletionRequest, body))


def test_keys_are_forgotten_by_age_by_number_and_by_bytes() -> None:
    now = [0.0]
    limits = Limits(
        idempotency_ttl_s=600,
        max_idempotency_keys=2,
        max_kept_answer_bytes=6,
        max_kept_answers_bytes=10,
    )
    store = KeyStore(limits, lambda: now[0])

    def keep(key: str, answer: bytes) -> None:
        store.claim(call(key))
        store.keep(call(key), answer)

    keep("a", b"12345")
    keep("b", b"12345")
    with pytest.raises(IdempotencyConflict):
        store.claim(call("a", "Ho"))
    keep("c", b"1")  # a third key: the oldest goes
    assert [store.find(call(key)) for key in "abc"] == [None, b"12345", b"1"]
    keep("d", b"123456")  # and again, by number
    keep("e", b"12345")  # 6 + 5 bytes: d goes
    assert [store.find(call(key)) for key in "cde"] == [None, None, b"12345"]
    keep("f", b"1234567")  # too large to keep, but the key is known
    with pytest.raises(IdempotencyConflict):
        store.find(call("f", "Ho"))
    assert store.find(call("f")) is None
    now[0] = 600.0
    assert store.find(call("f", "Ho")) is None


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
    headers = {"X-Request-Id": given.encode("latin-1")}
    response = httpx.get(serve().url + "/livez", headers=headers, timeout=TIMEOUT_S)
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


def test_a_draining_server_is_not_ready(serve: Callable[..., Served]) -> None:
    """Load balancers look elsewhere before anybody is refused."""
    served = serve()
    asyncio.run(served.service.drain())
    body = {"status": "draining", "stage": "draining", "done": 0, "total": 0}
    for path in ("/readyz", "/health"):
        response = served.get(path)
        assert (response.status_code, response.json()) == (503, body)
    assert served.get("/livez").status_code == 200


def test_limits_and_version(serve: Callable[..., Served]) -> None:
    served = serve()
    limits = served.get("/v1/limits").json()
    assert limits["max_context_tokens"] == CONTEXT
    assert {k: limits[k] for k in Limits.model_fields} == Limits().model_dump()
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
    generating = document["paths"][CHAT]["post"]
    assert "renormalised" in generating["responses"]["200"]["description"]
    assert generating["parameters"][0]["name"] == "Idempotency-Key"
    names = {body["$ref"].rpartition("/")[2] for body in bodies}
    assert names == {
        "ChatCompletionRequest",
        "CompletionRequest",
        "TokenizeRequest",
        "DetokenizeRequest",
    }
