"""What the deploy commands rely on, alike in memory and on a real server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s.api_server.client import Client
from tests.k8s.api_server.definitions import has_kuberay_schemas
from tests.k8s.api_server.errors import ApiError, Json
from tests.k8s.api_server.patches import JSON
from tests.k8s.api_server.samples import config_map, pod, ray_service, refusal
from tests.k8s.api_server.server import SimEnv

pytestmark = pytest.mark.k8s


class TestApply:
    def test_a_field_no_longer_applied_is_removed(self, admin: Client, namespace: str) -> None:
        admin.apply(config_map(namespace, a="1", b="2"))
        assert admin.apply(config_map(namespace, a="1"))["data"] == {"a": "1"}

    def test_a_field_that_another_owns_too_stays(self, admin: Client, namespace: str) -> None:
        admin.apply(config_map(namespace, a="1", b="2"), "shoal")
        admin.apply(config_map(namespace, b="2"), "gitops")
        assert admin.apply(config_map(namespace, a="1"), "shoal")["data"] == {"a": "1", "b": "2"}

    def test_a_conflict_names_owner_and_field(self, admin: Client, namespace: str) -> None:
        admin.apply(config_map(namespace, a="1"), "gitops")
        with refusal(409) as caught:
            admin.apply(config_map(namespace, a="9"), "shoal")
        cause = caught.value.details["causes"][0]
        assert (cause["reason"], cause["field"]) == ("FieldManagerConflict", ".data.a")
        assert 'conflict with "gitops"' in cause["message"]
        assert admin.get("ConfigMap", "settings", namespace)["data"] == {"a": "1"}

    def test_force_takes_the_field_over(self, admin: Client, namespace: str) -> None:
        admin.apply(config_map(namespace, a="1"), "gitops")
        admin.apply(config_map(namespace, a="9"), "shoal", force=True)
        with refusal(409):
            admin.apply(config_map(namespace, a="1"), "gitops")

    def test_a_changed_field_belongs_to_who_changed_it(self, admin: Client, namespace: str) -> None:
        admin.apply(config_map(namespace, a="1"), "shoal")
        admin.patch("ConfigMap", "settings", namespace, {"data": {"a": "2"}})
        with refusal(409) as caught:
            admin.apply(config_map(namespace, a="1"), "shoal")
        assert '"tests"' in caught.value.details["causes"][0]["message"]

    def test_the_same_value_is_shared(self, admin: Client, namespace: str) -> None:
        admin.apply(config_map(namespace, a="1"), "gitops")
        applied = admin.apply(config_map(namespace, a="1"), "shoal")
        managers = {m["manager"]: m["fieldsV1"] for m in applied["metadata"]["managedFields"]}
        assert managers["gitops"] == managers["shoal"] == {"f:data": {"f:a": {}}}

    def test_again_changes_nothing(self, admin: Client, namespace: str) -> None:
        first = admin.apply(config_map(namespace, a="1"))
        again = admin.apply(config_map(namespace, a="1"))
        assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]

    def test_items_with_keys_come_and_go_one_by_one(self, admin: Client, namespace: str) -> None:
        def port(name: str, number: int) -> Json:
            return {"name": name, "port": number, "protocol": "TCP"}  # 1.20 has no default

        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "serve", "namespace": namespace},
            "spec": {"ports": [port("http", 8000), port("grpc", 9000)]},
        }
        admin.apply(service, "shoal")
        other = {**service, "spec": {"ports": [port("metrics", 8080)]}}
        admin.apply(other, "monitoring")
        only = {**service, "spec": {"ports": [port("http", 8000)]}}
        ports = admin.apply(only, "shoal")["spec"]["ports"]
        assert {each["port"] for each in ports} == {8000, 8080}

    def test_creates_what_is_missing(self, admin: Client, namespace: str) -> None:
        created = admin.apply(config_map(namespace, a="1"))
        assert created["metadata"]["uid"]
        assert admin.get("ConfigMap", "settings", namespace)["data"] == {"a": "1"}

    def test_an_unknown_field_is_refused(self, admin: Client, namespace: str) -> None:
        with pytest.raises(ApiError, match="lifetime"):
            admin.apply({**config_map(namespace), "lifetime": 3})


class TestDryRun:
    def test_answers_as_if_and_writes_nothing(self, admin: Client, namespace: str) -> None:
        answer = admin.apply(config_map(namespace, a="1"), dryRun="All")
        assert answer["data"] == {"a": "1"}
        assert admin.find("ConfigMap", "settings", namespace) is None

    def test_finds_conflicts(self, admin: Client, namespace: str) -> None:
        admin.apply(config_map(namespace, a="1"), "gitops")
        with refusal(409):
            admin.apply(config_map(namespace, a="2"), "shoal", dryRun="All")

    def test_deletes_nothing(self, admin: Client, namespace: str) -> None:
        admin.create(config_map(namespace))
        admin.delete("ConfigMap", "settings", namespace, dryRun="All")
        assert admin.find("ConfigMap", "settings", namespace)


class TestRefusals:
    def test_not_found(self, admin: Client, namespace: str) -> None:
        with refusal(404) as caught:
            admin.get("ConfigMap", "nothing", namespace)
        assert caught.value.reason == "NotFound"
        assert caught.value.message == 'configmaps "nothing" not found'

    def test_no_such_namespace(self, admin: Client) -> None:
        with refusal(404) as caught:
            admin.apply(config_map("no-such-place"))
        assert "no-such-place" in caught.value.message

    def test_no_such_kind(self, admin: Client) -> None:
        with refusal(404):
            admin.raw("GET", "/apis/monitoring.coreos.com/v1/podmonitors")

    def test_exists_already(self, admin: Client, namespace: str) -> None:
        admin.create(config_map(namespace))
        with refusal(409) as caught:
            admin.create(config_map(namespace))
        assert caught.value.reason == "AlreadyExists"

    def test_an_old_version_is_not_overwritten(self, admin: Client, namespace: str) -> None:
        old = admin.create(config_map(namespace, a="1"))
        admin.apply(config_map(namespace, b="2"))
        with refusal(409) as caught:
            admin.replace({**old, "data": {"a": "3"}})
        assert caught.value.reason == "Conflict"

    def test_a_bad_name(self, admin: Client, namespace: str) -> None:
        named = config_map(namespace)
        named["metadata"]["name"] = "Bad_Name"
        with refusal(422) as caught:
            admin.create(named)
        assert caught.value.details["causes"][0]["field"] == "metadata.name"

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda c, s: c.update(volumeMounts=[{"name": "x", "mountPath": "/x"}]), "Not found"),
            (lambda c, s: c["ports"][0].update(name="a-very-long-port-name"), "15 characters"),
            (
                lambda c, s: c.update(
                    resources={
                        "limits": {"nvidia.com/gpu": "8"},
                        "requests": {"nvidia.com/gpu": "4"},
                    }
                ),
                "must be equal to nvidia.com/gpu limit",
            ),
            (lambda c, s: s.update(tolerations=[{"key": "x", "effect": "Never"}]), "effect"),
            (lambda c, s: s.update(volumes=[{"name": "v", "emptyDir": {}}] * 2), "Duplicate value"),
        ],
        ids=["mount", "port name", "gpu", "toleration", "volume"],
    )
    def test_a_pod_that_cannot_be(
        self, admin: Client, namespace: str, change: Any, says: str
    ) -> None:
        wrong = pod(namespace)
        change(wrong["spec"]["containers"][0], wrong["spec"])
        with refusal(422) as caught:
            admin.create(wrong)
        assert says in caught.value.message

    def test_an_unknown_priority_class(self, admin: Client, namespace: str) -> None:
        with refusal(403) as caught:
            admin.create(pod(namespace, priorityClassName="nope"))
        assert "no PriorityClass with name nope was found" in caught.value.message


class TestReading:
    def test_label_selectors(self, admin: Client, namespace: str) -> None:
        admin.create(pod(namespace))

        def found(labels: str) -> int:
            return len(admin.select("Pod", namespace, labels))

        assert found("tier=experts") == found("tier in (experts, router)") == found("tier") == 1
        assert found("tier!=experts") == found("!tier") == found("tier=router") == 0

    def test_json_patch(self, admin: Client, namespace: str) -> None:
        admin.create(config_map(namespace, a="1"))
        operations = [{"op": "replace", "path": "/data/a", "value": "2"}]
        patched = admin.patch("ConfigMap", "settings", namespace, operations, JSON)
        assert patched["data"] == {"a": "2"}

    def test_watch_from_a_version_sees_every_change_in_order(
        self, admin: Client, namespace: str
    ) -> None:
        since = admin.create(config_map(namespace, a="1"))["metadata"]["resourceVersion"]
        admin.apply(config_map(namespace, b="2"))
        admin.delete("ConfigMap", "settings", namespace)
        watch = iter(admin.watch("ConfigMap", namespace, since))
        seen = [next(watch)["type"], next(watch)["type"]]
        watch.close()  # type: ignore[attr-defined]
        assert seen == ["MODIFIED", "DELETED"]

    def test_watch_waits_for_what_comes(self, admin: Client, namespace: str) -> None:
        since = admin.listing("ConfigMap", namespace)["metadata"]["resourceVersion"]
        watch = admin.watch("ConfigMap", namespace, since)
        writer = threading.Thread(target=admin.create, args=(config_map(namespace, a="1"),))
        writer.start()
        events = iter(watch)
        assert next(events)["object"]["data"] == {"a": "1"}
        events.close()  # type: ignore[attr-defined]
        writer.join()

    def test_a_cut_watch_ends(self, admin: Client, namespace: str) -> None:
        since = admin.listing("ConfigMap", namespace)["metadata"]["resourceVersion"]
        watch = admin.watch("ConfigMap", namespace, since)
        reader = threading.Thread(target=list, args=(watch,))
        reader.start()
        watch.cut()
        reader.join(timeout=60)
        assert not reader.is_alive()

    def test_watch_from_a_forgotten_version(self, admin: Client, namespace: str) -> None:
        with refusal(410) as caught:
            list(admin.watch("RayService", namespace, "1"))
        assert caught.value.reason in ("Expired", "Gone")


class TestCustomResources:
    def test_status_has_a_door_of_its_own(self, admin: Client, namespace: str) -> None:
        created = admin.apply({**ray_service(namespace), "status": {"numServeEndpoints": 7}})
        assert "numServeEndpoints" not in created.get("status", {})
        body = {"status": {"numServeEndpoints": 7}, "spec": {"serveConfigV2": "not here"}}
        patched = admin.patch("RayService", "shoal", namespace, body, subresource="status")
        assert patched["status"]["numServeEndpoints"] == 7
        assert "serveConfigV2" not in patched["spec"]

    def test_generation_counts_changes_of_the_spec(self, admin: Client, namespace: str) -> None:
        generations = [
            admin.apply(obj)["metadata"]["generation"]
            for obj in (
                ray_service(namespace),
                ray_service(namespace),
                ray_service(namespace, serveConfigV2="applications: []"),
            )
        ]
        body = {"status": {"numServeEndpoints": 1}}
        patched = admin.patch("RayService", "shoal", namespace, body, subresource="status")
        assert generations == [1, 1, 2]
        assert patched["metadata"]["generation"] == 2


def head_of(service: Json) -> Any:
    return service["spec"]["rayClusterConfig"]["headGroupSpec"]


@pytest.mark.skipif(
    not has_kuberay_schemas(), reason="KubeRay's schemas are not beside this folder"
)
class TestKubeRaysSchema:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda s: head_of(s).pop("template"), "template"),
            (lambda s: head_of(s)["rayStartParams"].update({"num-cpus": 0}), "num-cpus"),
            (
                lambda s: s["spec"]["rayClusterConfig"].update(autoscalerOptions={"version": "v3"}),
                "autoscalerOptions.version",
            ),
            (
                lambda s: head_of(s)["template"]["spec"]["containers"].append({"name": "ray-head"}),
                "containers",
            ),
        ],
        ids=["required", "type", "enum", "duplicate"],
    )
    def test_mistakes(
        self, admin: Client, namespace: str, change: Callable[[Json], Any], says: str
    ) -> None:
        service = ray_service(namespace)
        change(service)
        with pytest.raises(ApiError, match=says):
            admin.apply(service)

    def test_an_unknown_field(self, kube: SimEnv, admin: Client, namespace: str) -> None:
        if kube.minor < 25:
            pytest.skip("old servers drop it silently")
        with pytest.raises(ApiError, match="autoscalerOption"):
            admin.apply(ray_service(namespace, autoscalerOption={}))


class TestDeletion:
    def test_a_finalizer_holds_it(self, admin: Client, namespace: str) -> None:
        held = config_map(namespace)
        held["metadata"]["finalizers"] = ["shoal.io/hold"]
        admin.create(held)
        admin.delete("ConfigMap", "settings", namespace)
        found = admin.get("ConfigMap", "settings", namespace)
        assert found["metadata"]["deletionTimestamp"]
        admin.patch("ConfigMap", "settings", namespace, {"metadata": {"finalizers": None}})
        assert admin.find("ConfigMap", "settings", namespace) is None
