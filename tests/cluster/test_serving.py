"""The deployed application with the clients that people use."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import time
from typing import Any

import grpc
import openai
import psutil
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.cluster.conftest import RayHarness, Server
from tests.fakes import TIMEOUT_S

pytestmark = pytest.mark.ray
HELLO = [{"role": "user", "content": "Hello, wörld"}]


@pytest.fixture
def sdk(server: Server) -> openai.OpenAI:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, server: Server, **more: Any) -> Any:
    body = {"max_tokens": 12, "temperature": 0.0, "extra_body": {"ignore_eos": True}, **more}
    return client.chat.completions.create(model=server.model, messages=HELLO, **body)


def test_openai_chat_whole_and_streamed_give_the_same_text(
    sdk: openai.OpenAI, server: Server
) -> None:
    whole = chat(sdk, server)
    chunks = list(chat(sdk, server, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert whole.usage.prompt_tokens == chunks[-1].usage.prompt_tokens


def test_openai_logprobs_line_up_with_the_text(sdk: openai.OpenAI, server: Server) -> None:
    answer = chat(sdk, server, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 12
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.decode("utf-8", "replace") == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)  # greedy


def test_openai_completions_echo_and_token_prompts(sdk: openai.OpenAI, server: Server) -> None:
    ids = server.post("/tokenize", {"prompt": "abc"})["tokens"]
    by_text, by_ids = (
        sdk.completions.create(
            model=server.model, prompt=prompt, max_tokens=4, temperature=0, echo=True, logprobs=1
        )
        for prompt in ("abc", ids)
    )
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.choices[0].text.startswith("abc")
    assert by_text.choices[0].logprobs.token_logprobs[0] is None


def test_openai_async_streams_run_together(server: Server) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model=server.model, messages=HELLO, max_tokens=8, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x") as client:
            return await asyncio.gather(*(one(client, seed % 4) for seed in range(8)))

    texts = asyncio.run(run())
    assert texts[:4] == texts[4:]  # the seed decides, not the batch


def test_openai_error_types(sdk: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt-nothing", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        chat(sdk, server, temperature=2.5)
    assert bad.value.param == "temperature"


def test_langchain(server: Server) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        base_url=server.url + "/v1", api_key="none", model=server.model, max_tokens=8, temperature=0
    )
    whole = model.invoke("Hi").content
    assert whole == "".join(str(chunk.content) for chunk in model.stream("Hi"))


def reflected(channel: grpc.Channel) -> Any:
    """Messages of shoal.v1 from reflection alone: no generated code of ours."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    return pool.FindServiceByName("shoal.v1.Inference"), pool


def test_grpc_by_reflection_gives_the_ids_of_http(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        service, _ = reflected(channel)
        method = service.methods_by_name["Generate"]
        request_class = message_factory.GetMessageClass(method.input_type)
        reply_class = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_stream(
            "/shoal.v1.Inference/Generate",
            request_serializer=request_class.SerializeToString,
            response_deserializer=reply_class.FromString,
        )
        request = request_class()
        request.token_ids.ids.extend([20, 30, 40])
        request.sampling.temperature = 0.0
        request.sampling.max_tokens = 10
        request.sampling.ignore_eos = True
        ids = [i for reply in call(request, timeout=60) for i in reply.delta.token_ids]
    body = {"prompt": [20, 30, 40], "max_tokens": 10, "temperature": 0, "ignore_eos": True}
    choice = server.post("/v1/completions", {**body, "return_token_ids": True})["choices"][0]
    assert ids == choice["token_ids"]


def test_grpc_health(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def open_stream(server: Server, seed: int, num_tokens: int) -> http.client.HTTPConnection:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    body = {
        "messages": HELLO,
        "stream": True,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "seed": seed,
    }
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    return connection


def seconds_to_free_after_hanging_up(server: Server) -> float:
    server.wait_idle()
    connection = open_stream(server, 1, 2000)
    response = connection.getresponse()
    response.readline()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    response.close()
    return server.wait_idle()


def test_a_client_that_goes_away_frees_its_blocks(server: Server) -> None:
    # One of ten: the question is what the server needs, not what else the machine does.
    assert any(seconds_to_free_after_hanging_up(server) < 0.5 for _ in range(10))


def grpc_stream(channel: grpc.Channel, seed: int) -> Any:
    """A Chat call through the reflected service; its messages come as they are read."""
    service, _ = reflected(channel)
    method = service.methods_by_name["Chat"]
    request_class = message_factory.GetMessageClass(method.input_type)
    reply_class = message_factory.GetMessageClass(method.output_type)
    request = request_class()
    request.messages.add(role="user", content="Hello")
    request.sampling.seed = seed
    request.sampling.max_tokens = 40
    request.sampling.ignore_eos = True
    call = channel.unary_stream(
        "/shoal.v1.Inference/Chat",
        request_serializer=request_class.SerializeToString,
        response_deserializer=reply_class.FromString,
    )
    return call(request, timeout=60)


def test_sixteen_mixed_streams_with_cancellations_return_every_block(server: Server) -> None:
    """Ten over HTTP and six over gRPC, all started before any is read; every third gives up."""
    server.wait_idle()
    finished = 0
    with grpc.insecure_channel(server.grpc_address) as channel:
        calls = [grpc_stream(channel, seed) for seed in range(6)]
        connections = [open_stream(server, seed, 40) for seed in range(10)]
        for number, call in enumerate(calls):
            if number % 3 == 0:  # gone after the first message
                next(call)
                call.cancel()
            else:
                assert sum(len(reply.delta.token_ids) for reply in call) == 40
                finished += 1
        for number, connection in enumerate(connections):
            response = connection.getresponse()
            if number % 3 == 0:
                response.readline()
            else:
                lines = [line for line in response.read().split(b"\n\n") if line.strip()]
                assert lines[-1].strip() == b"data: [DONE]"
                finished += 1
            response.close()
            connection.close()
    assert finished == 10
    server.wait_idle()


def test_everything_listens_on_loopback_only(server: Server, ray_harness: RayHarness) -> None:
    ports = {int(server.url.rpartition(":")[2]), int(server.grpc_address.rpartition(":")[2])}
    listening = {
        (c.laddr.ip, c.laddr.port)
        for c in psutil.net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port in ports
    }
    assert {port for _, port in listening} == ports
    assert {ip.removeprefix("::ffff:") for ip, _ in listening} == {"127.0.0.1"}


def test_status_names_every_worker_by_role(server: Server) -> None:
    status = server.get("/status")
    roles = sorted(worker["role"] for worker in status["workers"])
    assert roles == ["attention", "experts", "experts", "ingress", "router"]
    pids = {worker["pid"] for worker in status["workers"]}
    assert len(pids) == 5 and os.getpid() not in pids
    slots = sum(w["num_slots"] for w in status["workers"])
    assert slots > 3 * 16  # three MoE layers of sixteen experts, and some replicas
    deadline_s = time.monotonic() + TIMEOUT_S  # ready means every expert once; replicas follow
    while sum(w["num_experts"] for w in server.get("/status")["workers"]) != slots:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_time_of_health_checks(server: Server) -> None:
    def seconds() -> float:
        started_s = time.monotonic()
        for path in ("/livez", "/readyz", "/health", "/version", "/v1/models"):
            assert server.get(path) is not None
        return time.monotonic() - started_s

    assert any(seconds() < 1 for _ in range(10))
