"""From deploy.yaml to an answer: the rendered application of preset cpu-dev on a real Ray, deployed
through an API server by the stand-in for KubeRay."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import yaml
from typer.testing import CliRunner

from cluster.deploy.api import Cluster
from cluster.deploy.apply import apply_all
from cluster.deploy.cli import k8s_app
from cluster.deploy.config import read_deploy_config
from cluster.deploy.follow import Deployment, Follower
from cluster.deploy.manifest import Manifest
from cluster.deploy.render import render
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.cluster.conftest import wait_ready

if TYPE_CHECKING:
    from tests.k8s.api_server.server import SimEnv
    from tests.k8s.local_ray import LocalRay

pytestmark = [pytest.mark.k8s, pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

TIMEOUT_S = 600
"""For one deployment on a machine that does much else; alone it takes a tenth."""
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def local_ray() -> Iterator[LocalRay]:
    from tests.k8s.local_ray import LocalRay

    ray = LocalRay()
    try:
        ray.start()
        yield ray
    finally:
        ray.stop()


@pytest.fixture
def deploy_file(tmp_path: Path, namespace: str) -> Path:
    """Preset cpu-dev in the namespace of this test."""
    path = tmp_path / "deploy.yaml"
    path.write_text(yaml.safe_dump({"preset": "cpu-dev", "namespace": namespace}))
    return path


def with_import_path(manifests: list[Manifest], path: str) -> list[Manifest]:
    for manifest in manifests:
        if manifest["kind"] == "RayService":
            config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
            config["applications"][0]["import_path"] = path
            manifest["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    return manifests


def ask_over_http(port: int) -> Any:
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": MAX_TOKENS}
    body |= {"model": "shoal-tiny", "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return json.load(response)


def ask_over_grpc(port: int) -> tuple[list[pb.ChatResponse], list[pb.GenerateResponse]]:
    """The same chat, and a text to go on with."""
    sampling = pb.SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    message = pb.ChatMessage(role="user", content="Hello")
    options: Any = {"metadata": [("application", "shoal")], "timeout": TIMEOUT_S}
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        chat = stub.Chat(pb.ChatRequest(messages=[message], sampling=sampling), **options)
        text = stub.Generate(pb.GenerateRequest(text="Hello", sampling=sampling), **options)
        return list(chat), list(text)


def test_the_deployment_answers(
    kube: SimEnv, kuberay: Callable[..., Any], local_ray: LocalRay, deploy_file: Path
) -> None:
    kuberay(serve=local_ray)
    options = ["--kubeconfig", str(kube.cluster("admin")), "--timeout", str(TIMEOUT_S)]
    result = CliRunner().invoke(k8s_app, ["apply", "-c", str(deploy_file), *options])
    assert result.exit_code == 0, f"{result.output}\n{local_ray.statuses}"
    assert "ready: RayService/shoal" in result.output
    wait_ready(f"http://127.0.0.1:{local_ray.http_port}")
    over_http = ask_over_http(local_ray.http_port)
    chat, text = ask_over_grpc(local_ray.grpc_port)
    content = "".join(event.delta.text for event in chat)
    assert over_http["choices"][0]["message"]["content"] == content != ""
    assert over_http["usage"]["completion_tokens"] == chat[-1].usage.completion_tokens
    assert text[-1].usage.completion_tokens == MAX_TOKENS


def test_a_wrong_import_path_is_told_in_rays_words(
    kube: SimEnv, kuberay: Callable[..., Any], local_ray: LocalRay, deploy_file: Path
) -> None:
    kuberay(serve=local_ray)
    config = read_deploy_config(deploy_file)
    cluster = Cluster(kube.cluster("admin"))
    apply_all(cluster, with_import_path(render(config), "cluster.app:no_such_app"))
    follower = Follower(Deployment(cluster, config.namespace, config.name))
    judged = follower.wait_ready(TIMEOUT_S, lambda verdict: None)
    assert judged.state == "failed"
    assert "no_such_app" in "\n".join(judged.causes)
