"""Sequences that lose their worker go on on another: what clients see is what they would have seen.

The fake engine loses a sequence where a test says; the dead worker then says everything once more,
so that every test here also proves that late outputs are never taken for the new worker's.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from attention.messages import Submit
from cluster.config import parse_config
from cluster.frontend.backend import Readiness
from cluster.frontend.openai import CompletionRequest
from cluster.frontend.replay import MAX_FRUITLESS_REPLAYS
from cluster.frontend.schema_errors import parse_body
from cluster.frontend.service import InferenceService
from cluster.inline import InlineCluster
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.fakes import TIMEOUT_S, FakeEngine, stop_behind
from tests.serving import EOS, grpc_server, http_server, ids_of, make_service, wait_connected

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "Hello 漢字!"
HELLO = [*ids_of(TEXT), EOS]
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
NUM_STREAMS = 32


def once_at(num_tokens: int) -> Callable[[Submit, int], int | None]:
    """Every sequence loses its first worker behind so many tokens."""
    return lambda submit, attempt: num_tokens if attempt == 1 else None


class Served:
    """A service over an engine, on HTTP and, if asked for, on gRPC."""

    def __init__(
        self, folder: Path, engine: FakeEngine, stack: ExitStack, **options: object
    ) -> None:
        self.engine = engine
        self.service: InferenceService = make_service(folder, engine, **options)
        self._stack = stack
        self.url = stack.enter_context(http_server(self.service))
        stack.callback(engine.close)

    @property
    def sdk(self) -> openai.OpenAI:
        client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        )
        return self._stack.enter_context(client)

    @property
    def stub(self) -> Any:
        address = self._stack.enter_context(grpc_server(self.service))
        channel = self._stack.enter_context(grpc.insecure_channel(address))
        return inference_pb2_grpc.InferenceStub(channel)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=TIMEOUT_S)

    def whole(self, path: str, **body: Any) -> Any:
        """The answer without what is drawn for it."""
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        answer = response.json()
        return {key: answer[key] for key in ("choices", "usage")}

    def streamed(self, path: str, **body: Any) -> list[Any]:
        """The choices of all chunks, those of one index in order, and the usage in the last one."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = self.post(path, **body, **options)
        assert response.status_code == 200, response.text
        *events, done = response.text[:-2].split("\n\n")
        assert done == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        choices.sort(key=lambda choice: choice["index"])  # indices take turns as they come
        return [*choices, chunks[-1]["usage"]]

    def ended(self) -> bool:
        """Whether nothing is left of any request."""
        return self.service.num_open_sequences == len(self.service.ledger) == 0


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    with ExitStack() as stack:
        yield lambda engine, **options: Served(tmp_path, engine, stack, **options)


# ---- what clients see

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (CHAT, {"messages": MESSAGES}),
    "logprobs": (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
    "two answers": (CHAT, {"messages": MESSAGES, "n": 2, "seed": 4}),
    "ids": (CHAT, {"messages": MESSAGES, "return_token_ids": True}),
    "stop string": (CHAT, {"messages": MESSAGES, "stop": "lo 漢"}),
    "no stop string": (CHAT, {"messages": MESSAGES, "stop": "lo X"}),
    "length": (CHAT, {"messages": MESSAGES, "max_tokens": 4}),
    "echo": (COMPLETIONS, {"prompt": ["ab", "c"], "echo": True, "logprobs": 1, "max_tokens": 6}),
    "prompt only": (COMPLETIONS, {"prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 0}),
}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Its engine is never disturbed."""
    with ExitStack() as stack:
        yield Served(tmp_path_factory.mktemp("quiet"), FakeEngine(HELLO, cached=1), stack)


@pytest.mark.parametrize("lost_at", [0, 1, 4, 7, len(HELLO)])  # 7: inside a character
@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_those_of_an_undisturbed_engine(
    serve: Callable[[FakeEngine], Served], quiet: Served, name: str, lost_at: int
) -> None:
    path, body = REQUESTS[name]
    served = serve(FakeEngine(HELLO, cached=1, lose=once_at(lost_at)))
    assert served.whole(path, **body) == quiet.whole(path, **body)
    assert served.streamed(path, **body) == quiet.streamed(path, **body)
    assert served.service.ledger.num_replays == len(served.engine.replayed) > 0
    assert served.ended()


def test_sdk_streams_through_the_loss(serve: Callable[[FakeEngine], Served]) -> None:
    sdk = serve(FakeEngine(HELLO, lose=once_at(6))).sdk
    with sdk.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].finish_reason == "stop"


def test_grpc_streams_through_the_loss(serve: Callable[[FakeEngine], Served]) -> None:
    served = serve(FakeEngine(HELLO, lose=once_at(6)))
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Hi")])
    *events, last = served.stub.Chat(request, timeout=TIMEOUT_S)
    assert [i for event in events for i in event.delta.token_ids] == HELLO
    assert last.usage.completion_tokens == len(HELLO)


def test_a_worker_lost_at_every_token_costs_nothing(
    serve: Callable[[FakeEngine], Served],
) -> None:
    lose = lambda submit, attempt: attempt if attempt <= len(HELLO) else None  # noqa: E731
    served = serve(FakeEngine(HELLO, lose=lose))
    answer = served.whole(CHAT, messages=MESSAGES)
    assert answer["choices"][0]["message"]["content"] == TEXT
    assert served.service.ledger.num_replays == len(HELLO)


# ---- what workers get


def test_a_replay_continues_the_same_random_stream(serve: Callable[[FakeEngine], Served]) -> None:
    served = serve(FakeEngine(HELLO, lose=once_at(3)))
    served.whole(CHAT, messages=MESSAGES, seed=5, timeout=60)
    first, again = served.engine.submitted[0], served.engine.replayed[0]
    assert again.emitted_ids == HELLO[:3]
    assert (again.request_id, again.prompt_ids, again.params) == (
        first.request_id,
        first.prompt_ids,
        first.params,
    )
    assert first.deadline_s is not None and again.deadline_s is not None
    assert 0 < again.deadline_s < first.deadline_s


def test_what_kills_every_worker_is_given_up(serve: Callable[[FakeEngine], Served]) -> None:
    served = serve(FakeEngine(HELLO, lose=lambda submit, attempt: 2))
    response = served.post(CHAT, messages=MESSAGES)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
    assert "workers in a row" in response.json()["error"]["message"]
    assert len(served.engine.replayed) == 1 + MAX_FRUITLESS_REPLAYS
    assert served.ended()


# ---- the gap


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_in_the_gap_stops_the_replay(
    serve: Callable[[FakeEngine], Served], stream: bool
) -> None:
    served = serve(FakeEngine(HELLO, lose=once_at(2)))
    served.engine.parked = True

    async def leave_in_the_gap() -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            body = {"messages": MESSAGES, "stream": stream}
            task = asyncio.create_task(client.post(served.url + CHAT, json=body))
            await asyncio.to_thread(served.engine.wait_for, lambda: bool(served.engine.replayed))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave_in_the_gap())
    lost = served.engine.replayed[0].request_id
    assert served.engine.wait_for(lambda: served.engine.aborted == [lost])
    assert served.ended()


@pytest.mark.parametrize(
    ("missing", "status", "code"),
    [
        (None, 504, "deadline_exceeded"),
        ("attention", 503, "no_worker"),
        ("experts", 503, "experts_unavailable"),
    ],
)
def test_the_deadline_in_the_gap_says_what_was_away(
    serve: Callable[..., Served], missing: Any, status: int, code: str
) -> None:
    # Time stands still: a request waits 0.5 s for each output, and here for none but the replay's.
    served = serve(FakeEngine(HELLO, lose=once_at(2)), clock=lambda: 0.0)
    served.engine.parked = True
    served.engine.readiness = Readiness(True, "loading experts 3/8", missing=missing)
    response = served.post(CHAT, messages=MESSAGES, timeout=0.5)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in response.headers) == (status == 503)
    assert ("3/8" in response.text) == (missing == "experts")
    lost = served.engine.replayed[0].request_id
    assert served.engine.aborted == [lost]
    assert served.ended()


def test_a_stream_goes_on_behind_the_gap(serve: Callable[[FakeEngine], Served]) -> None:
    """The replay is asked for at once, whether or not anybody reads; keep-alives fill the gap."""
    served = serve(FakeEngine(HELLO, lose=once_at(5)))
    served.engine.parked = True
    body = {"messages": MESSAGES, "stream": True}
    with httpx.stream("POST", served.url + CHAT, json=body, timeout=TIMEOUT_S) as response:
        assert served.engine.wait_for(lambda: len(served.engine.replayed) == 1)
        served.engine.unpark()
        data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in data]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]


# ---- many at once


def answer_of(submit: Submit) -> list[int]:
    """20 to 60 letters drawn from the seed, then the end: what any worker would say."""
    draw = random.Random(submit.params.seed)
    letters = "".join(draw.choices("abcdefghij 漢", k=draw.randint(20, 40)))
    return [*ids_of(letters), EOS]


def test_a_storm_of_losses_changes_no_stream(serve: Callable[[FakeEngine], Served]) -> None:
    """32 streams, each loses up to 4 workers at random tokens: ids, text and usage stay."""

    def lose(submit: Submit, attempt: int) -> int | None:
        draw = random.Random(f"{submit.params.seed}-{attempt}")
        return len(submit.emitted_ids) + draw.randint(0, 12) if attempt <= 4 else None

    quiet, stormy = serve(FakeEngine(answer_of)), serve(FakeEngine(answer_of, lose=lose))

    async def stream(client: openai.AsyncOpenAI, seed: int) -> tuple[str, list[int], int, int]:
        chunks = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            seed=seed,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )
        text, ids, ends, usage = "", list[int](), 0, 0
        async for chunk in chunks:
            usage = chunk.usage.completion_tokens if chunk.usage else usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                ids += (choice.model_extra or {}).get("token_ids") or []
                ends += choice.finish_reason is not None
        return text, ids, ends, usage

    async def all_streams(served: Served) -> list[tuple[str, list[int], int, int]]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        ) as client:
            return await asyncio.gather(*(stream(client, seed) for seed in range(NUM_STREAMS)))

    expected = asyncio.run(all_streams(quiet))
    assert asyncio.run(all_streams(stormy)) == expected
    for text, ids, ends, usage in expected:
        assert (ids_of(text), ends, usage) == (ids[:-1], 1, len(ids))
    assert stormy.service.ledger.num_replays == len(stormy.engine.replayed) > NUM_STREAMS
    assert stormy.ended()


# ---- with real engines


def test_an_attention_worker_dies_under_streams(checkpoint_dir: Callable[[str], Path]) -> None:
    """Its streams continue on the other one: every id is that of an undisturbed run."""
    settings = {
        "model": str(checkpoint_dir("v2-lite")),
        "deterministic": True,
        "attention": {"num_workers": 2},
        "router": {"mode": "inline"},
    }
    dies = asyncio.Event()

    async def stream(service: InferenceService, seed: int) -> list[int]:
        body = {"prompt": [20 + seed] * (5 + seed), "max_tokens": 40, "ignore_eos": True}
        request = parse_body(CompletionRequest, {**body, "seed": seed, "temperature": 1.0})
        ids: list[int] = []
        with closing(await service.complete(request)) as generation:
            async for delta in generation:
                ids += delta.token_ids
                if len(ids) > 5:
                    dies.set()
        return ids

    async def all_streams(cluster: InlineCluster, disturb: bool) -> list[list[int]]:
        async def kill() -> None:
            await dies.wait()
            await asyncio.to_thread(cluster.attention[0].worker.close)

        dies.clear()
        work = [stream(cluster.ingress.service, seed) for seed in range(6)]
        if disturb:
            return (await asyncio.gather(*work, kill()))[:-1]
        return await asyncio.gather(*work)

    with InlineCluster(parse_config(settings)) as cluster:
        wait_connected(cluster.ingress.pool, 2)
        expected = asyncio.run(all_streams(cluster, False))
        assert [len(ids) for ids in expected] == [40] * 6
        stop_behind(cluster.attention[0].worker, 8)  # so it has not ended by then
        assert asyncio.run(all_streams(cluster, True)) == expected
        assert 1 <= cluster.ingress.service.ledger.num_replays <= 3  # every second one was on it
