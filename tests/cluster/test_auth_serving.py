"""API keys in the deployed application: through Serve's HTTP and gRPC proxies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.frontend.api_keys import new_key
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.cluster.conftest import RayHarness, Server
from tests.cluster.test_grpc import details_of
from tests.fakes import TIMEOUT_S

pytestmark = pytest.mark.ray
USER, USER_KEY = new_key("inference", "user")
ADMIN, ADMIN_KEY = new_key("admin", "admin")


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"{USER_KEY.line}\n{ADMIN_KEY.line}\n")
    return path


@pytest.fixture
def server(ray_harness: RayHarness, keys_file: Path) -> Server:
    """As few workers as can be: this is about Serve's proxies and the ingress."""
    few = {"experts": {"num_workers": 1}, "router": {"mode": "inline"}}
    return ray_harness.serve(auth={"keys_file": str(keys_file)}, **few)


def status_of(server: Server, path: str, key: str | None, body: Any = None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    method = "GET" if body is None else "POST"
    url = server.url + path
    return httpx.request(method, url, headers=headers, json=body, timeout=TIMEOUT_S).status_code


def tokenize(stub: Any, key: str | None) -> str:
    """Name of the status."""
    metadata = [("authorization", f"Bearer {key}")] if key else []
    try:
        stub.Tokenize(pb.TokenizeRequest(text="Hi"), metadata=metadata, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        assert details_of(error)["ErrorInfo"].domain == "shoal"
        return f"{error.code().name} {details_of(error)['ErrorInfo'].reason}"
    return "OK"


def test_keys_through_serves_proxies(server: Server, keys_file: Path) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=USER, max_retries=0) as client:
        completion = client.completions.create(
            model=server.model, prompt="Hi", max_tokens=2, extra_body={"ignore_eos": True}
        )
    assert completion.usage and completion.usage.completion_tokens == 2
    assert [status_of(server, path, None) for path in ("/livez", "/readyz", "/health")] == [200] * 3
    for path in ("/status", "//v1/models", "/v1%2fmodels", "/nowhere"):
        assert status_of(server, path, None) == 401
    assert status_of(server, "/nowhere", USER) == 404
    # Operations are on by themselves: they need the admin scope.
    rebalance = "/v1/experts/rebalance"
    keys = (None, "x" * 20, USER, ADMIN)
    assert [status_of(server, rebalance, key, {}) for key in keys] == [401, 401, 403, 200]

    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert [tokenize(stub, key) for key in keys] == [
            "UNAUTHENTICATED MISSING_API_KEY",
            "UNAUTHENTICATED INVALID_API_KEY",
            "OK",
            "OK",
        ]
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(pb.GenerateRequest(text="Hi"), timeout=TIMEOUT_S))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING

        keys_file.write_text(ADMIN_KEY.line)
        deadline = time.monotonic() + TIMEOUT_S  # it takes LOOK_PERIOD_S: test_auth_keys.py
        while (told := tokenize(stub, USER)) == "OK" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert told == "UNAUTHENTICATED INVALID_API_KEY"
    assert status_of(server, "/v1/models", USER) == 401
    assert status_of(server, "/v1/models", ADMIN) == 200
