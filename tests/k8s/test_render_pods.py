"""The pods of every deployment: rights, resources, volumes, nodes."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.deploy.config import PRESETS, preset_config
from cluster.deploy.manifests.volumes import quantity
from tests.k8s.deployments import deployment, rendered, templates

TIERS = ["ingress", "attention", "experts"]


@pytest.fixture(params=PRESETS)
def config(request: pytest.FixtureRequest) -> Any:
    return preset_config(request.param)


class TestPods:
    def test_run_as_nobody_special(self, config: Any) -> None:
        for spec in templates(config).values():
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }

    def test_the_last_lines_of_a_container_that_died_are_in_the_pods_status(
        self, config: Any
    ) -> None:
        for spec in templates(config).values():
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"

    def test_only_the_head_may_talk_to_the_api_server(self, config: Any) -> None:
        specs = templates(config)
        assert "serviceAccountName" not in specs.pop("head")  # KubeRay makes it
        for spec in specs.values():
            assert spec["serviceAccountName"] == "shoal-worker"
            assert spec["automountServiceAccountToken"] is False

    def test_all_know_the_clusters_secret(self, config: Any) -> None:
        for spec in templates(config).values():
            env = {e["name"]: e for e in spec["containers"][0]["env"]}
            reference = env["SHOAL_CLUSTER_SECRET"]["valueFrom"]["secretKeyRef"]
            assert reference == {"name": "shoal-cluster-secret", "key": "secret"}
            assert env["OMP_WAIT_POLICY"]["value"] == "passive"

    def test_logs_go_to_the_output_of_containers_if_asked(self) -> None:
        for asked in (True, False):
            for spec in templates(deployment("gpu-small", log_to_stderr=asked)).values():
                names = {e["name"] for e in spec["containers"][0]["env"]}
                assert ("RAY_LOG_TO_STDERR" in names) is asked

    def test_shared_memory_has_a_limit_below_the_pods(self, config: Any) -> None:
        for spec in templates(config).values():
            volumes = {v["name"]: v for v in spec["volumes"]}
            assert volumes["shared-mem"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
            mounts = {m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}
            assert "/dev/shm" in mounts
            memory = spec["containers"][0]["resources"]["limits"]["memory"]
            assert int(memory.removesuffix("Gi")) >= 2

    def test_gpus_are_asked_for_and_limited_alike_on_nodes_that_have_them(self) -> None:
        spec = templates(deployment("gpu-large"))["experts"]
        resources = spec["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        assert resources["limits"]["nvidia.com/gpu"] == "8"
        assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
        toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        assert toleration in spec["tolerations"]

    def test_the_model_is_checked_before_ray_starts(self) -> None:
        specs = templates(deployment("gpu-large"))
        for tier in TIERS:
            (check,) = specs[tier]["initContainers"]
            assert check["command"] == ["shoal", "model", "verify", "/models/DeepSeek-V3"]
            assert check["volumeMounts"][0]["mountPath"] == "/models"
        assert "initContainers" not in templates(deployment("cpu-dev"))["experts"]

    def test_racks_are_spread_over_and_fast_networks_kept_to(self) -> None:
        spec = templates(deployment("gpu-large"))["experts"]
        keys = [c["topologyKey"] for c in spec["topologySpreadConstraints"]]
        assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/rack"]
        affinity = spec["affinity"]["podAffinity"]
        (term,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
        assert term["podAffinityTerm"]["topologyKey"] == "topology.kubernetes.io/zone"

    def test_requests_are_the_limits_divided_by_the_overcommitment(self) -> None:
        resources = templates(deployment("cpu-dev"))["head"]["containers"][0]["resources"]
        assert resources["limits"] == {"cpu": "2", "memory": "3Gi"}
        assert resources["requests"] == {"cpu": "500m", "memory": "768Mi"}

    def test_the_laptops_preset_fits_a_laptop(self) -> None:
        specs = templates(deployment("cpu-dev")).values()
        asked = [spec["containers"][0]["resources"]["requests"] for spec in specs]
        sidecar = 1024 + 200j  # the autoscaler's, MiB and millicores
        total = sidecar + sum(_mebibytes(r["memory"]) + 1j * _millicores(r["cpu"]) for r in asked)
        assert total.real <= 5 * 1024
        assert total.imag <= 3000


class TestStorage:
    def test_a_claim_holds_the_checkpoint_and_a_tenth(self) -> None:
        claim = rendered(deployment("gpu-large"))["PersistentVolumeClaim/shoal-models"]["spec"]
        assert claim["accessModes"] == ["ReadWriteMany"]
        assert claim["resources"]["requests"]["storage"] == "690Gi"  # 673.2 GB

    def test_a_claim_that_exists_is_only_mounted(self) -> None:
        config = deployment("gpu-large", storage={"claim": {"name": "mine", "create": False}})
        assert "PersistentVolumeClaim/mine" not in rendered(config)
        volumes = {v["name"]: v for v in templates(config)["experts"]["volumes"]}
        source = {"claimName": "mine", "readOnly": True}
        assert volumes["models"] == {"name": "models", "persistentVolumeClaim": source}

    def test_a_folder_of_the_nodes_needs_a_namespace_that_allows_it(self) -> None:
        config = deployment("gpu-large", storage={"claim": None, "host_path": "/mnt/nvme"})
        volumes = {v["name"]: v for v in templates(config)["experts"]["volumes"]}
        assert volumes["models"]["hostPath"] == {"path": "/mnt/nvme", "type": "Directory"}
        labels = rendered(config)["Namespace/shoal"]["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "privileged"
        labels = rendered(deployment("gpu-large"))["Namespace/shoal"]["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "baseline"


def test_quantities_are_exact() -> None:
    assert [quantity(n) for n in (3 * 2**30, 1536 * 2**20, 1024, 1000)] == [
        "3Gi",
        "1536Mi",
        "1Ki",
        "1000",
    ]


def _mebibytes(text: str) -> int:
    return int(text[:-2]) * (1024 if text.endswith("Gi") else 1)


def _millicores(text: str) -> int:
    return int(text[:-1]) if text.endswith("m") else 1000 * int(text)
