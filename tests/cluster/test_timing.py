"""What answers say of their time, over HTTP and gRPC, of a whole cluster in this process."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.config import parse_config
from cluster.frontend.openai import CompletionRequest
from cluster.frontend.schema_errors import parse_body
from cluster.inline import InlineCluster
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.fakes import TIMEOUT_S, FakeEngine, stop_behind
from tests.serving import EOS, grpc_server, http_server, ids_of, make_service, wait_connected

PARTS = {"queue_ms", "prefill_ms", "decode_ms", "hop_ms", "hop_share", "expert_ms", "total_ms"}
HEADER = re.compile(
    ", ".join(
        rf"{name};dur=(?P<{name}>\d+\.\d{{3}})"
        for name in ("queue", "prefill", "decode", "hop", "expert", "total")
    )
)


def settings(folder: Path, mode: str, num_attention: int = 1) -> dict[str, Any]:
    return {
        "model": str(folder),
        "attention": {"num_workers": num_attention},
        "router": {"mode": mode, "worker": {"hop_timeout_s": TIMEOUT_S}},  # no work is done twice
    }


@pytest.fixture(params=["deployment", "inline"])
def cluster(
    request: pytest.FixtureRequest, checkpoint_dir: Callable[[str], Path]
) -> Iterator[InlineCluster]:
    config = parse_config(settings(checkpoint_dir("v2-lite"), request.param))
    with InlineCluster(config) as made:
        yield made


def check(timing: dict[str, float]) -> None:
    """What holds for every request of a quiet cluster."""
    assert timing.keys() == PARTS
    assert min(timing.values()) > 0
    assert timing["queue_ms"] + timing["prefill_ms"] + timing["decode_ms"] <= timing["total_ms"]
    steps_ms = timing["hop_ms"] / timing["hop_share"]
    assert timing["hop_ms"] < steps_ms <= timing["total_ms"]


def test_answers_and_what_the_experts_computed(cluster: InlineCluster) -> None:
    """Two prompts with n = 2, then a stream, then gRPC: they pay for what the workers counted."""
    body = {"prompt": ["Hello", "Good morning"], "max_tokens": 8, "ignore_eos": True}
    paid = []
    with http_server(cluster.ingress.service) as url:
        whole = httpx.post(
            f"{url}/v1/completions", json={**body, "n": 2, "timing": True}, timeout=TIMEOUT_S
        )
        found = HEADER.fullmatch(whole.headers["x-shoal-timing"])
        timing = whole.json()["timing"]
        check(timing)
        paid.append(timing["expert_ms"])
        assert found is not None
        for name, text in found.groupdict().items():
            assert float(text) == pytest.approx(timing[f"{name}_ms"], abs=1e-3)
        for options in ({}, {"stream_options": {"include_usage": True}}):
            streamed = {**body, **options, "stream": True, "timing": True}
            answer = httpx.post(f"{url}/v1/completions", json=streamed, timeout=TIMEOUT_S)
            assert "x-shoal-timing" not in answer.headers
            *chunks, last, done = [line for line in answer.text.split("\n") if line]
            told = json.loads(last.removeprefix("data: "))
            check(told["timing"])
            assert (told["choices"], "usage" in told, done) == ([], bool(options), "data: [DONE]")
            assert not any("timing" in chunk for chunk in chunks)
            paid.append(told["timing"]["expert_ms"])
    with grpc_server(cluster.ingress.service) as address, grpc.insecure_channel(address) as channel:
        sampling = pb.SamplingParams(max_tokens=8, ignore_eos=True)
        request = pb.GenerateRequest(text="Hello", sampling=sampling, timing=True)
        *_, last = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=TIMEOUT_S)
        check({field.name: value for field, value in last.timing.ListFields()})
        paid.append(last.timing.expert_ms)
    counters = [member.worker.counters for member in cluster.experts]
    busy_ms = 1e3 * sum(c.busy_s for c in counters)
    assert sum(paid) == pytest.approx(busy_ms, rel=0.02)


def test_nothing_is_said_unasked(tmp_path: Path) -> None:
    engine = FakeEngine([*ids_of("Hello"), EOS])
    service = make_service(tmp_path, engine)
    with http_server(service) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"}, timeout=TIMEOUT_S)
        assert "timing" not in answer.json()
        assert HEADER.fullmatch(answer.headers["x-shoal-timing"])
        for wrong in ("yes", 1, None, {}):
            body = {"prompt": "Hi", "timing": wrong}
            refused = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "timing"
    with grpc_server(service) as address, grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        *_, last = stub.Generate(pb.GenerateRequest(text="Hi"), timeout=TIMEOUT_S)
        assert not last.HasField("timing")
    engine.close()


def test_times_add_up_when_a_worker_dies(checkpoint_dir: Callable[[str], Path]) -> None:
    """All of the time since a request came is in one of its parts, the replay's too."""
    config = parse_config(settings(checkpoint_dir("v2-lite"), "inline", num_attention=2))

    async def stream(cluster: InlineCluster, seed: int) -> tuple[int, float, float]:
        fields = {"prompt": [20 + seed] * 5, "max_tokens": 100, "ignore_eos": True, "seed": seed}
        request = parse_body(CompletionRequest, fields)
        num_tokens = 0
        with closing(await cluster.ingress.service.complete(request)) as generation:
            async for delta in generation:
                num_tokens += len(delta.token_ids)
                if seed == 0 and num_tokens == 6:
                    await asyncio.to_thread(cluster.attention[0].worker.close)
            timing, e2e_s = generation.timing, generation.observation.e2e_s
        assert timing.hop_s > 0 and timing.expert_ms > 0
        return num_tokens, timing.queue_s + timing.prefill_s + timing.decode_s, e2e_s

    async def all_streams(cluster: InlineCluster) -> list[tuple[int, float, float]]:
        return await asyncio.gather(*(stream(cluster, seed) for seed in range(4)))

    with InlineCluster(config) as cluster:
        wait_connected(cluster.ingress.pool, 2)
        stop_behind(cluster.attention[0].worker, 40)
        ended = asyncio.run(all_streams(cluster))
        assert cluster.ingress.service.ledger.num_replays >= 1  # half of them were on it
        for num_tokens, parts_s, e2e_s in ended:
            assert num_tokens == 100
            assert 0.9 * e2e_s < parts_s <= e2e_s
