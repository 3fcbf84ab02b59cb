"""`shoal k8s apply` and `diff` against an API server."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.k8s.shoal_cli import Shoal

if TYPE_CHECKING:
    from tests.k8s.api_server.client import Client
    from tests.k8s.api_server.server import SimEnv

pytestmark = pytest.mark.k8s
MONITORING = {"monitoring": {"enabled": True}}


@pytest.fixture
def shoal(kube: SimEnv, namespace: str, tmp_path: Path) -> Shoal:
    return Shoal(kube, namespace, tmp_path)


def actions(out: str) -> dict[str, str]:
    """What the lines of an apply say, by object."""
    return dict(line.split("  ")[0].split(": ", 1) for line in out.splitlines())


def set_delay(admin: Client, namespace: str, seconds: int, manager: str) -> None:
    """Somebody else decides a field that we set, too."""
    spec = {"rayClusterDeletionDelaySeconds": seconds}
    metadata = {"name": "shoal", "namespace": namespace}
    service = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": metadata, "spec": spec}
    admin.apply(service, manager, force=True)


class TestApply:
    def test_makes_everything_and_then_finds_it_unchanged(self, shoal: Shoal) -> None:
        first = shoal("apply", "--no-wait")
        assert first.exit_code == 0, first.text
        done = actions(first.out)
        assert done.pop(f"Namespace/{shoal.namespace}") == "configured"
        assert done["RayService/shoal"] == done["Secret/shoal-ray-token"] == "created"
        skipped = {"skipped"} if shoal.kube.minor < 21 else set()  # disruption budgets
        assert set(done.values()) == {"created"} | skipped
        again = shoal("apply", "--no-wait")
        assert set(actions(again.out).values()) == {"unchanged"} | skipped

    def test_a_dry_run_changes_nothing(self, shoal: Shoal, admin: Client) -> None:
        result = shoal("apply", "--dry-run")
        assert actions(result.out)["RayService/shoal"] == "created"
        for kind in ("RayService", "Secret", "ServiceAccount"):
            names = {each["metadata"]["name"] for each in admin.select(kind, shoal.namespace)}
            assert names <= {"default"}

    def test_a_namespace_that_does_not_exist_is_made_first(
        self, shoal: Shoal, admin: Client
    ) -> None:
        name = f"{shoal.namespace}-new"
        shoal.write(namespace=name)
        rehearsed = shoal("apply", "--dry-run")
        assert "its namespace is new" in rehearsed.text
        assert admin.find("Namespace", name) is None
        assert shoal("apply", "--no-wait").exit_code == 0
        assert admin.get("RayService", "shoal", name)

    def test_kinds_that_the_cluster_lacks_are_skipped(self, shoal: Shoal) -> None:
        shoal.write(**MONITORING)
        result = shoal("apply", "--no-wait")
        assert result.exit_code == 0
        assert "PodMonitor/shoal: skipped (this cluster lacks the Prometheus" in result.text

    def test_mistakes_are_found_before_the_cluster_is_asked(
        self, shoal: Shoal, admin: Client
    ) -> None:
        shoal.write(settings={"experts": {"label_selector": {"shoal.io/tier": "nowhere"}}})
        result = shoal("apply", "--no-wait")
        assert (result.exit_code, "nothing was changed" in result.err) == (2, True)
        assert admin.find("RayService", "shoal", shoal.namespace) is None

    def test_what_the_server_refuses_changes_nothing(self, shoal: Shoal, admin: Client) -> None:
        metadata = {"name": "shoal-worker", "namespace": shoal.namespace}
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}
        admin.apply({**account, "automountServiceAccountToken": True}, "gitops")
        result = shoal("apply", "--no-wait")
        assert result.exit_code == 3
        field = ".automountServiceAccountToken"
        assert f"ServiceAccount/shoal-worker: {field} belongs to gitops" in result.err
        assert admin.find("RayService", "shoal", shoal.namespace) is None
        assert admin.find("Secret", "shoal-ray-token", shoal.namespace) is None


class TestConflicts:
    def test_a_conflict_names_owner_and_field_and_is_not_forced(
        self, shoal: Shoal, admin: Client
    ) -> None:
        shoal("apply", "--no-wait")
        set_delay(admin, shoal.namespace, 7, "gitops")
        result = shoal("apply", "--no-wait")
        assert result.exit_code == 3
        field = ".spec.rayClusterDeletionDelaySeconds"
        assert f"RayService/shoal: {field} belongs to gitops" in result.err
        assert "--force-conflicts" in result.err
        found = admin.get("RayService", "shoal", shoal.namespace)
        assert found["spec"]["rayClusterDeletionDelaySeconds"] == 7

    def test_force_takes_the_field(self, shoal: Shoal, admin: Client) -> None:
        shoal("apply", "--no-wait")
        set_delay(admin, shoal.namespace, 7, "gitops")
        result = shoal("apply", "--no-wait", "--force-conflicts")
        assert actions(result.out)["RayService/shoal"] == "configured"
        found = admin.get("RayService", "shoal", shoal.namespace)
        delay = shoal.config.upgrade.old_cluster_kept_s
        assert found["spec"]["rayClusterDeletionDelaySeconds"] == delay


class TestSecrets:
    def value(self, admin: Client, namespace: str, name: str, key: str) -> str:
        secret = admin.get("Secret", name, namespace)
        if "stringData" in secret:  # the server in memory keeps it
            return str(secret["stringData"][key])
        return base64.b64decode(secret["data"][key]).decode()

    def test_values_are_random_and_stay(self, shoal: Shoal, admin: Client) -> None:
        shoal("apply", "--no-wait")
        before = self.value(admin, shoal.namespace, "shoal-ray-token", "auth_token")
        assert len(before) == 64
        assert "Secret/shoal-ray-token: unchanged" in shoal("apply", "--no-wait").out
        after = self.value(admin, shoal.namespace, "shoal-ray-token", "auth_token")
        assert after == before

    def test_how_to_read_the_first_api_key_is_told_and_not_the_key(
        self, shoal: Shoal, admin: Client
    ) -> None:
        shoal.write(auth={"api_keys": True})
        result = shoal("apply", "--no-wait")
        key = self.value(admin, shoal.namespace, "shoal-api-keys", "keys").split()[-1]
        assert "get secret shoal-api-keys" in result.text
        assert key not in result.text


class TestPrune:
    def test_what_is_no_longer_rendered_goes_only_when_asked(
        self, shoal: Shoal, admin: Client
    ) -> None:
        shoal.write(network_policy={"enabled": True})
        shoal("apply", "--no-wait")
        shoal.write()
        shoal("apply", "--no-wait")
        assert admin.find("NetworkPolicy", "shoal-head", shoal.namespace)
        assert "apply --prune deletes it" in shoal("diff").text
        result = shoal("apply", "--no-wait", "--prune")
        assert "NetworkPolicy/shoal-head: deleted" in result.out
        assert admin.find("NetworkPolicy", "shoal-head", shoal.namespace) is None
        assert admin.find("Secret", "shoal-ray-token", shoal.namespace)

    def test_objects_of_other_deployments_stay(self, shoal: Shoal, admin: Client) -> None:
        labels = {
            "app.kubernetes.io/managed-by": "shoal",
            "app.kubernetes.io/instance": "other",
        }
        metadata = {"name": "other", "namespace": shoal.namespace, "labels": labels}
        admin.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
        shoal("apply", "--no-wait", "--prune")
        assert admin.find("ConfigMap", "other", shoal.namespace)


class TestBounds:
    def test_new_bounds_reach_the_running_cluster(
        self,
        shoal: Shoal,
        admin: Client,
        kuberay: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("cluster.deploy.history.SETTLE_S", 0)
        kuberay()
        shoal("apply")
        shoal.write(experts={"cpus": 2, "workers_per_pod": 2, "pods": 1, "max_pods": 3})
        result = shoal("apply")
        assert "experts 1 -> 1-3 pods" in result.out
        (cluster,) = admin.select("RayCluster", shoal.namespace)
        groups = {each["groupName"]: each for each in cluster["spec"]["workerGroupSpecs"]}
        assert groups["experts"]["maxReplicas"] == 3


class TestHalfChange:
    """upgrade.strategy None: settings of a live cluster change, its pods do not."""

    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cluster.deploy.history.SETTLE_S", 0)

    def write(self, shoal: Shoal, **settings: Any) -> None:
        shoal.write(upgrade={"strategy": "None"}, **settings)

    def test_changed_pods_are_refused_and_nothing_is_written(
        self, shoal: Shoal, admin: Client, kuberay: Callable[..., Any]
    ) -> None:
        kuberay()
        self.write(shoal)
        assert shoal("apply").exit_code == 0
        before = admin.get("RayService", "shoal", shoal.namespace)["spec"]
        self.write(shoal, image="shoal:new", settings={"strict_params": True})
        for args in (["--no-wait"], ["--dry-run"]):
            result = shoal("apply", *args)
            assert result.exit_code == 3
            assert ".workerGroupSpecs[experts].template.spec.containers[ray-worker]" in result.text
            assert "`shoal k8s down`, then apply; or upgrade.strategy: NewCluster" in result.text
        assert admin.get("RayService", "shoal", shoal.namespace)["spec"] == before
        assert "upgrade.strategy is None" in shoal("diff").err
        assert shoal("apply", "--anyway").exit_code == 0

    def test_changed_settings_and_another_strategy_are_not(
        self, shoal: Shoal, kuberay: Callable[..., Any]
    ) -> None:
        kuberay()
        self.write(shoal)
        shoal("apply")
        self.write(shoal, settings={"strict_params": True})
        assert shoal("apply").exit_code == 0
        shoal.write(image="shoal:new")
        assert shoal("apply").exit_code == 0

    def test_without_a_live_cluster_everything_may_change(self, shoal: Shoal) -> None:
        self.write(shoal)
        shoal("apply", "--no-wait")
        self.write(shoal, image="shoal:new")
        assert shoal("apply", "--no-wait").exit_code == 0


class TestDiff:
    def test_nothing_to_do(self, shoal: Shoal) -> None:
        shoal("apply", "--no-wait")
        result = shoal("diff")
        told = {line for line in result.out.splitlines() if ": skipped  (" not in line}
        assert (result.exit_code, told) == (0, set())

    def test_a_change_is_shown_and_not_made(self, shoal: Shoal, admin: Client) -> None:
        shoal("apply", "--no-wait")
        shoal.write(upgrade={"old_cluster_kept_s": 999})
        result = shoal("diff")
        assert result.exit_code == 1
        changed = [line for line in result.out.splitlines() if line[:2] in ("+ ", "- ")]
        assert changed == [
            "-  rayClusterDeletionDelaySeconds: 300",
            "+  rayClusterDeletionDelaySeconds: 999",
        ]
        found = admin.get("RayService", "shoal", shoal.namespace)
        assert found["spec"]["rayClusterDeletionDelaySeconds"] == 300

    def test_a_conflict_is_told_beside_the_difference(self, shoal: Shoal, admin: Client) -> None:
        shoal("apply", "--no-wait")
        set_delay(admin, shoal.namespace, 7, "gitops")
        result = shoal("diff")
        assert "belongs to gitops" in result.err
        assert "+  rayClusterDeletionDelaySeconds: 300" in result.out

    def test_secrets_that_will_be_made(self, shoal: Shoal) -> None:
        result = shoal("diff")
        assert "Secret/shoal-ray-token: created  (random value; " in result.out


class TestLimitedUser:
    """The rights of the rendered Role, and no more."""

    @pytest.fixture
    def granted(self, shoal: Shoal, admin: Client) -> None:
        for manifest in shoal.manifests():
            if manifest["kind"] in ("PriorityClass", "Role"):
                admin.apply(manifest, force=True)
        rbac = "rbac.authorization.k8s.io"
        admin.create(
            {
                "apiVersion": f"{rbac}/v1",
                "kind": "RoleBinding",
                "metadata": {"name": "ci", "namespace": shoal.namespace},
                "roleRef": {"apiGroup": rbac, "kind": "Role", "name": "shoal-deployer"},
                "subjects": [{"apiGroup": rbac, "kind": "User", "name": "deployer"}],
            }
        )

    @pytest.mark.usefixtures("granted")
    def test_the_rendered_role_is_enough(self, shoal: Shoal, kuberay: Callable[..., Any]) -> None:
        kuberay()
        shoal.write(admin_objects=False)
        result = shoal("apply", user="deployer")
        assert result.exit_code == 0, result.text
        assert shoal("status", user="deployer").exit_code == 0
        assert shoal("down", "--yes", user="deployer").exit_code == 0

    @pytest.mark.usefixtures("granted")
    def test_an_administrators_objects_are_skipped(self, shoal: Shoal) -> None:
        result = shoal("apply", "--no-wait", user="deployer")
        assert result.exit_code == 0, result.text
        assert f"Namespace/{shoal.namespace}: skipped" in result.out
        assert "you may neither read nor change it" in result.text
        assert actions(result.out)["RayService/shoal"] == "created"

    def test_without_rights_each_refusal_is_told(self, shoal: Shoal) -> None:
        result = shoal("apply", "--no-wait", user="deployer")
        assert result.exit_code == 3
        assert "RayService/shoal: HTTP 403: " in result.err
        assert "shoal: not applied, for what is listed above" in result.err
