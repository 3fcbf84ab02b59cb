"""Who may do what, alike in memory and on a real server; and what only the one in memory does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.api_server.client import Client
from tests.k8s.api_server.errors import Json
from tests.k8s.api_server.samples import config_map, eventually, pod, ray_service, refusal
from tests.k8s.api_server.server import SimEnv
from tests.k8s.kuberay_pods import owned_by

pytestmark = pytest.mark.k8s


def role(namespace: str, *verbs: str) -> list[Json]:
    """A Role for config maps, and `deployer` bound to it."""
    group = "rbac.authorization.k8s.io"
    metadata = {"name": "settings", "namespace": namespace}
    rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": list(verbs)}
    subject = {"kind": "User", "name": "deployer", "apiGroup": group}
    reference = {"kind": "Role", "name": "settings", "apiGroup": group}
    common = {"apiVersion": f"{group}/v1", "metadata": metadata}
    return [
        {**common, "kind": "Role", "rules": [rule]},
        {**common, "kind": "RoleBinding", "subjects": [subject], "roleRef": reference},
    ]


class TestAccess:
    @pytest.fixture
    def deployer(self, kube: SimEnv) -> Iterator[Client]:
        client = Client(kube.cluster("deployer"), "tests")
        yield client
        client.close()

    def test_without_a_role_nothing_is_allowed(self, deployer: Client, namespace: str) -> None:
        with refusal(403) as caught:
            deployer.get("ConfigMap", "settings", namespace)
        assert caught.value.reason == "Forbidden"
        assert 'User "deployer" cannot get resource "configmaps"' in caught.value.message
        assert f'in the namespace "{namespace}"' in caught.value.message

    def test_a_role_allows_its_verbs(self, admin: Client, deployer: Client, namespace: str) -> None:
        for obj in role(namespace, "get", "patch", "create"):
            admin.apply(obj)
        eventually(lambda: deployer.apply(config_map(namespace, a="1")))
        assert deployer.get("ConfigMap", "settings", namespace)["data"] == {"a": "1"}
        with refusal(403):
            deployer.delete("ConfigMap", "settings", namespace)
        with refusal(403):
            deployer.get("Secret", "settings", namespace)

    def test_apply_of_what_is_missing_needs_create(
        self, admin: Client, deployer: Client, namespace: str
    ) -> None:
        for obj in role(namespace, "get", "patch"):
            admin.apply(obj)
        eventually(lambda: deployer.find("ConfigMap", "settings", namespace))
        with refusal(403):
            deployer.apply(config_map(namespace, a="1"))
        assert admin.find("ConfigMap", "settings", namespace) is None

    def test_one_may_ask_what_one_may(
        self, admin: Client, deployer: Client, namespace: str
    ) -> None:
        for obj in role(namespace, "get"):
            admin.apply(obj)
        eventually(lambda: deployer.find("ConfigMap", "settings", namespace))

        def may(verb: str) -> bool:
            attributes = {"namespace": namespace, "verb": verb, "resource": "configmaps"}
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "metadata": {},
                "spec": {"resourceAttributes": attributes},
            }
            return bool(deployer.create(review)["status"]["allowed"])

        assert may("get")
        assert not may("delete")

    def test_an_unknown_token(self, kube: SimEnv, tmp_path: Path) -> None:
        config = json.loads(kube.cluster("admin").read_text())
        config["users"][0]["user"]["token"] = "made-up"
        (tmp_path / "config").write_text(json.dumps(config))
        client = Client(tmp_path / "config", "tests")
        with refusal(401):
            client.select("Namespace")
        client.close()


class TestSimulatorOnly:
    """What a real server needs more than itself for, or does not let a test bring about."""

    @pytest.fixture(autouse=True)
    def only_in_memory(self, kube: SimEnv) -> None:
        if not kube.is_simulated:
            pytest.skip("needs a kubelet, a controller or another moment")

    def test_logs(self, kube: SimEnv, admin: Client, namespace: str) -> None:
        admin.create(pod(namespace))
        kube.write_log(namespace, "worker", "one\ntwo\nthree\n")
        path = f"/api/v1/namespaces/{namespace}/pods/worker/log?tailLines=2"
        assert admin.text(path) == "two\nthree\n"

    def test_an_open_watch_can_become_too_old(
        self, kube: SimEnv, admin: Client, namespace: str
    ) -> None:
        since = admin.create(config_map(namespace))["metadata"]["resourceVersion"]
        watch = admin.watch("ConfigMap", namespace, since)
        kube.forget_events()
        with refusal(410):
            list(watch)

    def test_what_is_owned_goes_with_its_owner(self, admin: Client, namespace: str) -> None:
        owner = admin.create(ray_service(namespace))
        owned = config_map(namespace)
        owned["metadata"]["ownerReferences"] = owned_by(owner)
        admin.create(owned)
        admin.delete("RayService", "shoal", namespace)
        assert admin.find("ConfigMap", "settings", namespace) is None

    def test_a_namespace_takes_its_objects_along(self, admin: Client, namespace: str) -> None:
        admin.create(config_map(namespace))
        admin.delete("Namespace", namespace)
        assert admin.find("ConfigMap", "settings", namespace) is None
