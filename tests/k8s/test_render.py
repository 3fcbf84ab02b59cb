"""The application and the Ray cluster of every deployment."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from cluster.config import parse_config
from cluster.deploy.config import PRESETS, preset_config
from cluster.deploy.manifest import in_order
from cluster.deploy.manifests.rayservice import RAY_VERSION
from cluster.deploy.manifests.serve_config import IMPORT_PATH
from cluster.deploy.render import render
from tests.k8s.deployments import (
    application_args,
    deployment,
    group,
    ray_cluster,
    ray_service,
    serve_settings,
    templates,
)

TIERS = ["ingress", "attention", "experts"]


@pytest.fixture(params=PRESETS)
def config(request: pytest.FixtureRequest) -> Any:
    return preset_config(request.param)


def test_same_configuration_same_objects_in_the_order_they_are_made(config: Any) -> None:
    assert render(config) == render(config) == in_order(reversed(render(config)))
    kinds = [manifest["kind"] for manifest in render(config)]
    assert kinds[0] == "Namespace"
    assert kinds.index("ServiceAccount") < kinds.index("RayService")


def test_every_object_says_its_namespace_and_whose_it_is(config: Any) -> None:
    for manifest in render(config):
        metadata = manifest["metadata"]
        assert metadata["labels"]["app.kubernetes.io/instance"] == "shoal"
        is_global = manifest["kind"] in ("Namespace", "PriorityClass")
        assert metadata.get("namespace") == (None if is_global else "shoal")


def test_there_are_no_secrets_with_values(config: Any) -> None:
    assert not [m for m in render(config) if m["kind"] == "Secret"]


def test_the_version_of_ray_is_the_installed_one() -> None:
    assert importlib.metadata.version("ray") == RAY_VERSION


class TestApplication:
    def test_is_ours_with_settings_that_it_accepts(self, config: Any) -> None:
        (application,) = serve_settings(config)["applications"]
        assert (application["name"], application["import_path"]) == ("shoal", IMPORT_PATH)
        args = parse_config(application["args"])
        assert (args.channel, args.runtime_dir) == ("tcp", None)

    def test_every_deployment_has_its_tier_and_every_tier_a_deployment(self, config: Any) -> None:
        args = application_args(config)
        names = ("ingress", "placement", "attention", "router", "experts")
        wanted = {name: args[name]["label_selector"]["shoal.io/tier"] for name in names}
        assert wanted == {
            "ingress": "ingress",
            "placement": "ingress",
            "attention": "attention",
            "router": "attention",
            "experts": "experts",
        }
        groups = ray_cluster(config)["workerGroupSpecs"]
        assert [g["labels"]["shoal.io/tier"] for g in groups] == TIERS

    def test_replicas_without_a_gpu_cannot_pile_up_on_the_first_pod(self) -> None:
        cpu, gpu = deployment("cpu-dev"), deployment("gpu-large")
        tiers = ("ingress", "router", "attention", "experts")
        shares = [application_args(cpu)[tier].get("max_per_node") for tier in tiers]
        assert shares == [1, 1, 1, 2]
        shares = [application_args(gpu)[tier].get("max_per_node") for tier in tiers]
        assert shares == [2, 4, None, None]

    def test_the_replicas_at_most_fill_the_pods_at_most(self) -> None:
        config = deployment("gpu-large")  # 4 to 6 pods of 8 GPUs
        attention = application_args(config)["attention"]
        assert (attention["num_workers"], attention["num_gpus"]) == (32, 1)
        assert attention["device"] == "cuda"
        assert attention["scaling"] == {"min_workers": 32, "max_workers": 48, "follows_load": True}
        attention_group = group(config, "attention")
        assert [attention_group[f"{bound}Replicas"] for bound in ("min", "max")] == [4, 6]

    def test_a_tier_of_one_size_does_not_follow_the_load(self) -> None:
        scaling = application_args(deployment("cpu-dev"))["experts"]["scaling"]
        assert scaling == {"min_workers": 2, "max_workers": 2, "follows_load": False}

    def test_threads_are_the_pods_cores_not_the_nodes(self) -> None:
        experts = application_args(deployment("cpu-dev", experts={"cpus": 7}))["experts"]
        assert experts["num_threads"] == 3  # 7 cores, 2 workers

    def test_settings_go_on_top(self) -> None:
        config = deployment("cpu-dev", settings={"strict_params": True, "experts": {"num_gpus": 2}})
        args = application_args(config)
        assert args["strict_params"] is True
        assert args["experts"]["num_gpus"] == 2
        assert args["experts"]["num_workers"] == 2

    def test_api_keys_are_a_file_of_the_ingress_pods_alone(self) -> None:
        config = deployment("gpu-small")
        assert application_args(config)["auth"] == {"keys_file": "/etc/shoal/api-keys/keys"}
        mounted = {
            tier: [volume["name"] for volume in spec["volumes"] if "secret" in volume]
            for tier, spec in templates(config).items()
        }
        assert mounted == {"head": [], "ingress": ["api-keys"], "attention": [], "experts": []}


class TestService:
    def test_has_http_and_grpc_and_says_that_grpc_is_http2(self, config: Any) -> None:
        service = ray_service(config)["serveService"]["spec"]
        assert [(p["name"], p["port"], p.get("appProtocol")) for p in service["ports"]] == [
            ("serve", 8000, None),
            ("serve-grpc", 9000, "kubernetes.io/h2c"),
        ]

    def test_head_and_workers_have_its_ports(self, config: Any) -> None:
        for spec in templates(config).values():
            ports = {p["name"]: p["containerPort"] for p in spec["containers"][0]["ports"]}
            assert (ports["serve"], ports["serve-grpc"]) == (8000, 9000)
            assert all(len(name) <= 15 for name in ports)

    def test_the_head_takes_no_requests(self, config: Any) -> None:
        assert ray_service(config)["excludeHeadPodFromServeSvc"] is True


class TestCluster:
    def test_start_parameters_are_strings(self, config: Any) -> None:
        cluster = ray_cluster(config)
        for part in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert all(isinstance(value, str) for value in part["rayStartParams"].values())

    def test_the_head_runs_no_replica(self, config: Any) -> None:
        params = ray_cluster(config)["headGroupSpec"]["rayStartParams"]
        assert (params["num-cpus"], params["num-gpus"]) == ("0", "0")
        limits = templates(config)["head"]["containers"][0]["resources"]["limits"]
        assert "nvidia.com/gpu" not in limits

    def test_autoscaler_and_token_are_spelled_out(self, config: Any) -> None:
        cluster = ray_cluster(config)
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert cluster["autoscalerOptions"]["resources"]["limits"]["memory"] == "1Gi"
        assert cluster["authOptions"] == {"mode": "token", "secretName": "shoal-ray-token"}
        assert all(g["idleTimeoutSeconds"] >= 600 for g in cluster["workerGroupSpecs"])

    def test_an_incremental_upgrade_has_its_options_and_no_grpc(self) -> None:
        strategy = "NewClusterWithIncrementalUpgrade"
        config = deployment("gpu-small", upgrade={"strategy": strategy, "gateway_class": "envoy"})
        assert ray_service(config)["upgradeStrategy"] == {
            "type": strategy,
            "clusterUpgradeOptions": {
                "gatewayClassName": "envoy",
                "stepSizePercent": 10,
                "maxSurgePercent": 100,
                "intervalSeconds": 60,
            },
        }
        assert "grpc_options" not in serve_settings(config)
        (port,) = ray_service(config)["serveService"]["spec"]["ports"]
        assert port["name"] == "serve"

    def test_large_presets_never_ask_for_a_second_cluster(self) -> None:
        assert ray_service(deployment("gpu-large"))["upgradeStrategy"] == {"type": "None"}
        assert ray_service(deployment("gpu-small"))["upgradeStrategy"] == {"type": "NewCluster"}
