"""Logs of a deployed application: a line a request in the ingress's file, text in no file."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import grpc
import pytest

from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.cluster.conftest import RayHarness, Server
from tests.cluster.test_logs import parse_text
from tests.fakes import TIMEOUT_S

pytestmark = pytest.mark.ray
SECRET = "Xylophon-Quarz"


def log_files() -> dict[str, str]:
    """Name and text of every log file of Serve and of the workers' processes."""
    import ray

    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir(), context.get_session_name(), "logs")
    paths = [*folder.glob("serve/*.log"), *folder.glob("worker-*")]
    return {path.name: path.read_text(errors="replace") for path in paths}


def line_of(request_id: str) -> dict[str, str]:
    """The line of a request, which may come a moment after its answer."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        files = {name: text for name, text in log_files().items() if "_Ingress_" in name}
        lines = [line for text in files.values() for line in text.splitlines()]
        found = [line for line in lines if f" request_id={request_id} " in line]
        if found:
            (line,) = found
            return parse_text(line)
        time.sleep(0.05)
    pytest.fail(f"no line of {request_id}")


def test_requests_over_both_protocols_have_their_line_and_nobody_their_text(
    ray_harness: RayHarness, server: Server
) -> None:
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "X-Request-Id": "logged-1"}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    with grpc.insecure_channel(server.grpc_address) as channel:
        metadata = [("application", "shoal"), ("x-request-id", "logged-2")]
        bad = pb.GenerateRequest(text=SECRET, sampling=pb.SamplingParams(temperature=-1))
        events = inference_pb2_grpc.InferenceStub(channel).Generate(
            bad, metadata=metadata, timeout=TIMEOUT_S
        )
        with pytest.raises(grpc.RpcError):
            list(events)
    first, second = line_of("logged-1"), line_of("logged-2")
    assert (first["msg"], first["id"], first["outcome"]) == ("request", answer["id"], "ok")
    assert (first["completion_tokens"], first["finish"]) == ("5", "length")
    assert float(first["expert_ms"]) > 0 and float(first["hop_ms"]) > 0
    assert (second["msg"], second["code"]) == ("refused", "decimal_below_min_value")
    names = [name for name, text in log_files().items() if SECRET in text]
    assert names == []
