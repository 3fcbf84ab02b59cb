"""The rules' building blocks one by one: syntax, selectors, what fits where, facts of others."""

from __future__ import annotations

import importlib
import inspect
import warnings
from typing import Any

import pytest

from cluster.config import GRPC_SERVICERS, ShoalConfig
from cluster.deploy.check import serve_model, syntax
from cluster.deploy.check.application import Application, Deployment, read_application
from cluster.deploy.check.node import Node
from cluster.deploy.check.placement import placement_findings
from cluster.deploy.check.ray_cluster import Group, groups
from cluster.deploy.check.references import reference_findings
from cluster.deploy.check.selectors import selects
from cluster.deploy.check.source import Located
from cluster.deploy.manifests.serve_config import IMPORT_PATH
from cluster.field_names import suggest
from tests.k8s.seeded_mistakes import Objects
from tests.k8s.test_check import good

with warnings.catch_warnings():  # Ray imports what pydantic deprecates
    warnings.simplefilter("ignore")
    from ray.serve import schema as ray_schema

    from cluster import app


def node(value: Any) -> Node:
    return Node(value, (), lambda keys: ("a.yaml", "Kind/a"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        (4, 4),
        ("500m", 0.5),
        ("16Gi", 16 * 2**30),
        ("1.5G", 1.5e9),
        ("2e3", 2000),
        ("1E", 1e18),
        ("900Gx", None),
        ("", None),
        (True, None),
        (None, None),
    ],
)
def test_quantities(text: object, value: float | None) -> None:
    assert syntax.quantity(text) == value


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("1h30m", 5400), ("90", 90), ("-5", -5), ("2 hours", None), ("h", None)],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert syntax.duration_s(text) == seconds


@pytest.mark.parametrize(
    ("key", "is_one"),
    [
        ("app", True),
        ("shoal.io/tier", True),
        ("a" * 64, False),
        ("UPPER/x", False),
        ("a/b/c", False),
        ("/x", False),
        ("x/", False),
        ("bad key", False),
    ],
)
def test_label_keys(key: str, is_one: bool) -> None:
    assert syntax.is_label_key(key) is is_one


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("serve-grpc", True),
        ("a" * 15, True),
        ("a" * 16, False),
        ("80", False),
        ("a--b", False),
        ("", False),
    ],
)
def test_port_names(name: str, is_one: bool) -> None:
    assert syntax.is_port_name(name) is is_one


def test_suggestions() -> None:
    assert suggest("imgae", ["image", "name"]) == "did you mean image?"
    assert suggest("imgae", ["image"], {"image"}) == "remove it, image is there"
    assert suggest("zzz", ["b", "a"]) == "known here: a, b"
    assert suggest("zzz", [f"name{i:02}" for i in range(20)]).endswith("name11 and 8 more")
    assert suggest("zzz", []) == "remove it"


@pytest.mark.parametrize(
    ("selector", "taken"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "DoesNotExist"}]}, True),
    ],
)
def test_selectors(selector: dict[str, Any], taken: bool) -> None:
    assert selects(node(selector), {"a": "1"}) is taken


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({}, True),
        ({"tier": "experts"}, True),
        ({"tier": "!experts"}, False),
        ({"tier": "in(experts, attention)"}, True),
        ({"tier": "!in(experts)"}, False),
        ({"zone": "!a"}, True),
        ({"zone": "a"}, False),
        ({"ray.io/accelerator-type": "H200"}, True),  # set by Ray
    ],
)
def test_selectors_of_ray(wanted: dict[str, str], fits: bool) -> None:
    group = Group(node({"labels": {"tier": "experts"}}), "experts", False, "shoal")
    assert group.fits(wanted) is fits


@pytest.mark.parametrize(
    ("group", "gpus"),
    [
        ({"resources": {"GPU": "4"}}, 4),
        ({"rayStartParams": {"num-gpus": "2"}}, 2),
        ({}, 8),
    ],
)
def test_gpus_are_counted_as_ray_does(group: dict[str, Any], gpus: float) -> None:
    box = {"resources": {"limits": {"nvidia.com/gpu": "8", "cpu": "4"}}}
    spec = {"template": {"spec": {"containers": [box]}}}
    assert Group(node(spec | group), "g", False, "shoal").gpus_per_pod == gpus


def idle_pods(pods: int, **deployment: Any) -> list[str]:
    """Findings for a group of so many pods of 4 GPUs and one deployment that selects it."""
    box = {"resources": {"limits": {"nvidia.com/gpu": "4"}}}
    body = {"labels": {"a": "b"}, "minReplicas": pods, "maxReplicas": pods}
    group = node(body | {"template": {"spec": {"containers": [box]}}})
    one = Deployment("Experts", node({}), {"a": "b"}, **deployment)
    application = Application(node({}), node({}), ShoalConfig(), (one,))
    head = Group(node({}), "headgroup", True, "shoal")
    found = placement_findings(application, [head, Group(group, "g", False, "shoal")], None)
    return [finding.message for finding in found if "leave one empty" in finding.message]


def test_every_pod_gets_a_replica_when_the_others_are_full() -> None:
    assert not idle_pods(2, num_workers=5, num_gpus=1)  # 4 fit into a pod
    assert idle_pods(2, num_workers=4, num_gpus=1)
    assert idle_pods(2, num_workers=100)  # nothing bounds a pod without GPUs
    assert not idle_pods(2, num_workers=2, max_per_pod=1)
    assert not idle_pods(1, num_workers=1)
    assert not idle_pods(0, num_workers=1)


def test_an_inline_router_cannot_be_overridden() -> None:
    objects = Objects(list(good()))
    with objects.serve() as serve:
        (application,) = serve["applications"]
        application["args"]["router"]["mode"] = "inline"
        application["deployments"] = [{"name": "Router"}]
    _, found = read_application(Located("a.yaml", objects.service).root)
    assert [finding.message for finding in found] == [
        '"Router" is no deployment of this application'
    ]


def policies(change: Any) -> list[str]:
    """What is said when the two policies of a deployment are changed."""
    objects = Objects(list(good()))
    pods, head = (objects.one("NetworkPolicy", name)["spec"] for name in ("shoal", "shoal-head"))
    change(pods, head)
    located = [Located("a.yaml", each) for each in objects.all]
    return [f.message for f in reference_findings(located) if "NetworkPolicy" in f.path]


def test_network_policies() -> None:
    def ports(policy: Any, *ports: Any) -> None:
        policy["ingress"][0]["ports"] = list(ports)

    def no_dns(policy: Any) -> None:
        policy["egress"] = [rule for rule in policy["egress"] if "53" not in str(rule)]

    operator = "KubeRay's operator cannot reach the dashboard at 8265 of the head"
    assert policies(lambda pods, head: None) == []
    assert policies(lambda pods, head: ports(head, {"port": 8000, "endPort": 8300})) == []
    assert policies(lambda pods, head: ports(head, {"port": 8000})) == [operator]
    assert policies(lambda pods, head: ports(head, {"port": 8265, "protocol": "UDP"})) == [operator]
    assert policies(lambda pods, head: no_dns(pods)) == ["the pods cannot ask DNS"]
    (random_ports,) = policies(lambda pods, head: ports(pods, {"port": 6379}))
    assert "cannot reach each other on all ports" in random_ports
    (everybody,) = policies(lambda pods, head: head["ingress"].append({"ports": [{"port": 10001}]}))
    assert everybody == "everybody reaches Ray's client at 10001: they can run code"


def test_groups_carry_the_labels_that_kuberay_adds() -> None:
    head, ingress, *_ = groups(Located("a.yaml", Objects(list(good())).service).root)
    assert head.pod_labels["ray.io/node-type"] == "head"
    assert ingress.pod_labels["ray.io/group"] == "ingress"
    assert ingress.pod_labels["ray.io/serve"] == "true"


def test_facts_that_are_written_down_twice() -> None:
    for path in (*GRPC_SERVICERS, IMPORT_PATH.replace(":", ".")):
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
    bound = inspect.getsource(app.build_app)
    service = Located("a.yaml", Objects(list(good())).service)
    application, _ = read_application(service.root)
    assert application is not None
    assert all(f'"{each.name}"' in bound for each in application.deployments)
    assert bound.count("_deploy") == len(application.deployments)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (serve_model.ServeConfig, ray_schema.ServeDeploySchema),
        (serve_model.Application, ray_schema.ServeApplicationSchema),
        (serve_model.HttpOptions, ray_schema.HTTPOptionsSchema),
        (serve_model.GrpcOptions, ray_schema.gRPCOptionsSchema),
        (serve_model.LoggingConfig, ray_schema.LoggingConfig),
    ],
)
def test_fields_of_a_serve_config_are_rays(ours: Any, theirs: Any) -> None:
    assert set(ours.model_fields) == set(theirs.model_fields)
