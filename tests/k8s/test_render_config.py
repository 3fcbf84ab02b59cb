"""deploy.yaml: presets, what goes on top of them, and what is said of a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError
from cluster.deploy.api import FIELD_MANAGER
from cluster.deploy.apply import INSTANCE, MANAGED_BY
from cluster.deploy.config import PRESETS, parse_deploy_config, preset_config, read_deploy_config
from cluster.deploy.known_models import KNOWN
from cluster.deploy.secrets import missing_secrets
from cluster.deploy.sizing import size
from cluster.frontend.api_keys import read_keys
from tests.k8s.deployments import deployment, rendered

MODEL = {"name": "v2-lite", "path": "/models/lite"}
SPELLED_OUT = {"image": "shoal:1", "model": {"name": "embedded"}}


def refusal(**data: Any) -> str:
    """What is said of a file that holds this."""
    with pytest.raises(ConfigError) as error:
        parse_deploy_config(data)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_whole_deployment(name: str) -> None:
    assert preset_config(name).preset == name
    assert preset_config(name) == parse_deploy_config({"preset": name})


def test_a_file_goes_on_top_of_its_preset(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("preset: gpu-large\nname: big\nexperts: {pods: 3}\n")
    config = read_deploy_config(path)
    assert (config.name, config.experts.pods, config.experts.gpu) == ("big", 3, "h200")


def test_a_deployment_can_be_spelled_out() -> None:
    assert parse_deploy_config(SPELLED_OUT).preset is None


def test_a_model_of_ones_own_is_sized_by_its_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["v2-lite"]))
    (tmp_path / "deploy.yaml").write_text(
        "preset: gpu-small\nmodel: {name: null, config: config.json, path: /models/mine}\n"
    )
    config = read_deploy_config(tmp_path / "deploy.yaml")
    assert size(config).slots_per_worker == size(preset_config("gpu-small")).slots_per_worker


class TestRefusals:
    def test_name_file_field_and_value(self, tmp_path: Path) -> None:
        path = tmp_path / "deploy.yaml"
        path.write_text("preset: cpu-dev\nexperts: {pods: none}\n")
        with pytest.raises(ConfigError, match=r"deploy\.yaml: experts\.pods = 'none': "):
            read_deploy_config(path)

    def test_of_an_unknown_preset_list_the_known_ones(self) -> None:
        assert refusal(preset="gpu-huge").endswith("known ones are cpu-dev, gpu-small, gpu-large")

    def test_of_a_model_config_that_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "deploy.yaml"
        path.write_text("preset: gpu-small\nmodel: {name: null, config: nowhere.json}\n")
        with pytest.raises(ConfigError, match=r"nowhere\.json: .*model\.config names"):
            read_deploy_config(path)

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            ({}, "image: missing; add it, or name a preset"),
            ({"preset": "cpu-dev", "expert": {}}, "expert: unknown setting; did you mean experts?"),
            ({"preset": "cpu-dev", "name": "x" * 48}, "name = "),
            ({"preset": "cpu-dev", "name": "9lives"}, "name = '9lives'"),
            ({"preset": "cpu-dev", "experts": {"pods": 3, "max_pods": 2}}, "max_pods 2 is less"),
            ({"preset": "cpu-dev", "experts": {"gpus_per_pod": 1}}, "give both gpu"),
            ({"preset": "gpu-small", "storage": {"claim": None}}, "needs storage.claim"),
            ({"preset": "gpu-small", "storage": {"host_path": "/m"}}, "alternatives: remove one"),
            ({"preset": "gpu-small", "model": {"path": "/x"}}, "is not under storage.mount_path"),
            ({**SPELLED_OUT, "model": {"name": "v3"}}, "model: give path"),
            ({**SPELLED_OUT, "model": {"path": "/x"}}, "give either name or config"),
            (
                {"preset": "cpu-dev", "upgrade": {"strategy": "NewClusterWithIncrementalUpgrade"}},
                "gateway_class is missing",
            ),
            (
                {"preset": "cpu-dev", "gateway": {"grpc_hostname": "shoal.example.com"}},
                "give gRPC one of its own",
            ),
        ],
    )
    def test_say_what_to_do(self, data: dict[str, Any], says: str) -> None:
        assert says in refusal(**data)

    def test_of_settings_name_the_setting(self) -> None:
        config = deployment("cpu-dev", settings={"experts": {"slots": 3}})
        with pytest.raises(ConfigError, match=r"^settings: experts\.slots: unknown setting"):
            rendered(config)
        config = deployment("cpu-dev", settings={"channel": "unix"})
        with pytest.raises(ConfigError, match=r"^settings\.channel = 'unix': .*, pods need tcp or"):
            rendered(config)


class TestSecrets:
    def test_are_those_that_the_objects_name(self) -> None:
        names = [secret.name for secret in missing_secrets(deployment("gpu-large"))]
        assert names == ["shoal-cluster-secret", "shoal-ray-token", "shoal-api-keys", "shoal-redis"]
        assert [s.name for s in missing_secrets(deployment("cpu-dev"))] == names[:2]

    def test_are_random_and_of_the_form_that_is_read(self, tmp_path: Path) -> None:
        cluster, _, api_keys, _ = missing_secrets(deployment("gpu-large"))
        assert len(bytes.fromhex(cluster.new_value())) == 32
        assert cluster.new_value() != cluster.new_value()
        (tmp_path / "keys").write_text(api_keys.new_value())
        (key,) = read_keys(tmp_path / "keys")
        assert key.allows("inference")
        manifest = cluster.manifest("ab")
        assert manifest["stringData"] == {"secret": "ab"}
        assert manifest["metadata"]["namespace"] == "shoal"


class TestOptions:
    def test_an_administrators_objects_can_be_left_to_one(self) -> None:
        kinds = {name.partition("/")[0] for name in rendered(deployment(admin_objects=False))}
        assert not kinds & {"Namespace", "PriorityClass", "Role", "RoleBinding"}
        assert "ServiceAccount" in kinds

    def test_budgets_keep_all_pods_of_a_tier_but_one_and_never_wait_for_sick_ones(self) -> None:
        objects = rendered(deployment(ingress={"pods": 3}))  # attention has 4 pods, experts 2
        kept = {}
        for tier in ("head", "ingress", "attention", "experts"):
            spec = objects[f"PodDisruptionBudget/shoal-{tier}"]["spec"]
            assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
            assert spec["selector"]["matchLabels"]["app.kubernetes.io/component"] == tier
            assert "maxUnavailable" not in spec  # needs a scale, which a RayCluster has not
            kept[tier] = spec["minAvailable"]
        assert kept == {"head": 1, "ingress": 2, "attention": 3, "experts": 1}

    def test_a_tier_of_one_pod_has_no_budget_that_would_block_its_node(self) -> None:
        found = [name for name in rendered(deployment("cpu-dev")) if "Budget" in name]
        assert found == ["PodDisruptionBudget/shoal-head"]

    def test_the_deployer_may_make_every_namespaced_object_there_can_be(self) -> None:
        switches = ("network_policy", "monitoring", "gateway", "gcs_redis")
        objects = rendered(deployment(**{switch: {"enabled": True} for switch in switches}))
        rules = objects["Role/shoal-deployer"]["rules"]
        may_patch = {r for rule in rules if "patch" in rule["verbs"] for r in rule["resources"]}
        admins = {"Namespace", "PriorityClass", "Role", "RoleBinding"}
        kinds = {manifest["kind"] for manifest in objects.values()} - admins
        plurals = {kind.lower() + "s" for kind in kinds} - {"networkpolicys"}
        assert plurals | {"networkpolicies"} <= may_patch

    def test_the_operator_reaches_the_heads_dashboard_and_proxy(self) -> None:
        policy = rendered(deployment())["NetworkPolicy/shoal-head"]["spec"]
        (rule,) = policy["ingress"]
        assert [port["port"] for port in rule["ports"]] == [8265, 8000]
        (source,) = rule["from"]
        label = {"kubernetes.io/metadata.name": "kuberay-system"}
        assert source["namespaceSelector"]["matchLabels"] == label

    def test_nobody_else_reaches_what_runs_code(self) -> None:
        policy = rendered(deployment())["NetworkPolicy/shoal"]["spec"]
        among_themselves, *others = policy["ingress"]
        assert "ports" not in among_themselves  # Ray takes random ones
        assert not {8265, 10001, 6379} & {p["port"] for rule in others for p in rule["ports"]}

    def test_redis_keeps_its_password_in_one_place(self) -> None:
        cluster = rendered(deployment())["RayService/shoal"]["spec"]["rayClusterConfig"]
        options = cluster["gcsFaultToleranceOptions"]
        assert options["redisAddress"] == "shoal-redis:6379"
        reference = options["redisPassword"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "shoal-redis", "key": "password"}
        assert "redis-password" not in cluster["headGroupSpec"]["rayStartParams"]

    def test_the_claim_of_redis_is_found_when_data_are_to_go(self) -> None:
        (claim,) = rendered(deployment())["StatefulSet/shoal-redis"]["spec"]["volumeClaimTemplates"]
        labels = claim["metadata"]["labels"]
        assert (labels[INSTANCE], labels[MANAGED_BY]) == ("shoal", FIELD_MANAGER)

    def test_routes_let_answers_stream(self) -> None:
        objects = rendered(deployment(gateway={"enabled": True}))
        (rule,) = objects["HTTPRoute/shoal"]["spec"]["rules"]
        assert rule["timeouts"]["request"] == "0s"
        (rule,) = objects["GRPCRoute/shoal"]["spec"]["rules"]
        assert rule["backendRefs"] == [{"name": "shoal-serve-svc", "port": 9000}]
