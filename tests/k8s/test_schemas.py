"""Every object is valid by Kubernetes' schemas, 1.30 to 1.37, by KubeRay's, and by our check."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.deploy.check.checks import check_manifests
from cluster.deploy.check.source import Located
from cluster.deploy.config import PRESETS, DeployConfig
from cluster.deploy.manifest import Manifest, identity
from cluster.deploy.render import render
from cluster.deploy.secrets import missing_secrets
from cluster.deploy.sizing import model_sizes
from tests.k8s.api_server.crds import CustomResource
from tests.k8s.deployments import deployment

VERSIONS = [f"1.{minor}" for minor in range(30, 38)]
CRD = Path(__file__).resolve().parents[3] / "shared/kuberay-crds/ray.io_rayservices.yaml"
ELSEWHERE = {"RayService", "PodMonitor", "PrometheusRule", "HTTPRoute", "GRPCRoute"}
"""Kinds that Kubernetes itself does not define."""
SWITCHES = ("network_policy", "monitoring", "gateway", "gcs_redis")

needs_crd = pytest.mark.skipif(not CRD.exists(), reason=f"KubeRay's schema is not at {CRD}")


def everything(**changes: Any) -> DeployConfig:
    """With all that can be switched on."""
    return deployment(
        "gpu-large",
        **{switch: {"enabled": True} for switch in SWITCHES},
        image_pull_secrets=["pull"],
        storage={"claim": None, "host_path": "/mnt/nvme"},
        head={"node_selector": {"pool": "cpu"}, "tolerations": [{"key": "cpu", "value": "x"}]},
        **changes,
    )


INCREMENTAL = {"strategy": "NewClusterWithIncrementalUpgrade", "gateway_class": "envoy"}
DEPLOYMENTS = {name: deployment(name) for name in PRESETS} | {
    "everything": everything(),
    "incremental": everything(upgrade=INCREMENTAL),
}


@pytest.fixture(params=DEPLOYMENTS)
def config(request: pytest.FixtureRequest) -> DeployConfig:
    return DEPLOYMENTS[request.param]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(version: str) -> None:
    different: list[Manifest] = []
    for config in DEPLOYMENTS.values():
        secrets = [secret.manifest("value") for secret in missing_secrets(config)]
        different += [m for m in (*render(config), *secrets) if m not in different]
    for manifest in different:
        if manifest["kind"] not in ELSEWHERE:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", [*PRESETS, "everything"])
def test_our_own_check_finds_nothing(name: str) -> None:
    config = DEPLOYMENTS[name]
    located = [Located("rendered", manifest) for manifest in render(config)]
    for version in VERSIONS:
        assert check_manifests(located, version, model_sizes(config.model)) == []


@pytest.fixture(scope="module")
def crd() -> CustomResource:
    return CustomResource(yaml.load(CRD.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))  # noqa: S506


@needs_crd
def test_kuberay_knows_every_field(config: DeployConfig, crd: CustomResource) -> None:
    (service,) = [m for m in render(config) if identity(m) == "RayService/shoal"]
    assert [error.message for error in crd.errors(service)] == []
    assert crd.rule_errors(service, None) == []


@needs_crd
def test_kuberay_would_object(crd: CustomResource) -> None:
    (service,) = [m for m in render(deployment("cpu-dev")) if m["kind"] == "RayService"]
    wrong = copy.deepcopy(service)
    wrong["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert [error.message for error in crd.errors(wrong)] == ["0 is not of type 'string'"]
