"""Whether a cluster can take a deployment: what an offline check cannot know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import Forbidden
from cluster.deploy.apply import NO_KUBERAY
from cluster.deploy.manifest import CLUSTER_SCOPED, Manifest

Level = Literal["ok", "unknown", "error"]

GPU = "nvidia.com/gpu"
CRD = Ref("apiextensions.k8s.io/v1", "CustomResourceDefinition", "rayservices.ray.io")
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


@dataclass(frozen=True)
class Answer:
    """One question about the cluster. `unknown`: this user may not look, which is no error."""

    level: Level
    text: str


def preflight(cluster: Cluster, manifests: list[Manifest]) -> list[Answer]:
    """Answers to all questions. Raises Unreachable, Refused."""
    questions: tuple[Callable[[Cluster, list[Manifest]], Iterator[Answer]], ...] = (
        _kuberay,
        _gpus,
        _storage,
        _rights,
    )
    answers: list[Answer] = []
    for question in questions:
        try:
            answers += question(cluster, manifests)
        except Forbidden as error:
            answers.append(Answer("unknown", f"{question.__name__.strip('_')}: {error}"))
    return answers


# ---- KubeRay


def _kuberay(cluster: Cluster, manifests: list[Manifest]) -> Iterator[Answer]:
    if cluster.kind("ray.io/v1", "RayService") is None:
        yield Answer("error", NO_KUBERAY)
        return
    definition = cluster.get(CRD)
    versions = definition["spec"]["versions"] if definition else []
    root: dict[str, Any] = next(
        (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"), {}
    )
    schema = root.get("properties", {}).get("spec", {})
    services = [each for each in manifests if each["kind"] == "RayService"]
    unknown = [path for each in services for path in unknown_fields(each["spec"], schema, "spec")]
    for path in unknown:
        yield Answer("error", f"KubeRay here does not know {path}: upgrade it to 1.7 or newer")
    if not unknown:
        yield Answer("ok", "KubeRay knows every field of the RayService")


def unknown_fields(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    """Paths in a value that its structural schema lacks."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_fields(item, schema.get("items", {}), f"{path}[{index}]")
    elif isinstance(value, dict) and "properties" in schema:
        for key, item in value.items():
            if key in schema["properties"]:
                yield from unknown_fields(item, schema["properties"][key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"


# ---- GPUs


def _gpus(cluster: Cluster, manifests: list[Manifest]) -> Iterator[Answer]:
    groups = [
        group
        for each in manifests
        if each["kind"] == "RayService"
        for group in each["spec"]["rayClusterConfig"].get("workerGroupSpecs") or []
        if _gpus_per_pod(group)
    ]
    if not groups:
        return
    nodes = cluster.select("v1", "Node")
    for group in groups:
        yield _gpu_answer(group, nodes)


def _gpu_answer(group: dict[str, Any], nodes: list[Manifest]) -> Answer:
    name, per_pod = group["groupName"], _gpus_per_pod(group)
    wanted = (group.get("minReplicas") or 0) * (group.get("numOfHosts") or 1)
    selector = group["template"]["spec"].get("nodeSelector") or {}
    fitting = [node for node in nodes if selector.items() <= node["metadata"]["labels"].items()]
    room = sum(_allocatable(node) // per_pod for node in fitting)
    told = f"{name}: {wanted} pods of {per_pod} GPUs"
    if room >= wanted:
        return Answer("ok", f"{told}: the nodes have room for {room}, what runs there included")
    labels = ", ".join(f"{key}={value}" for key, value in selector.items()) or "any"
    return Answer(
        "error",
        f"{told}: {len(fitting)} nodes ({labels}) have room for {room} even when empty: add nodes, "
        "unless a cluster autoscaler does, or change the tier's gpu, gpus_per_pod or pods",
    )


def _gpus_per_pod(group: dict[str, Any]) -> int:
    containers = group["template"]["spec"]["containers"]
    limits = [each.get("resources", {}).get("limits") or {} for each in containers]
    return sum(int(limit.get(GPU, 0)) for limit in limits)


def _allocatable(node: Manifest) -> int:
    is_closed = node.get("spec", {}).get("unschedulable", False)
    return 0 if is_closed else int(node.get("status", {}).get("allocatable", {}).get(GPU, 0))


# ---- storage


def _storage(cluster: Cluster, manifests: list[Manifest]) -> Iterator[Answer]:
    claims = [each for each in manifests if each["kind"] == "PersistentVolumeClaim"]
    if not claims:
        return
    classes = cluster.select("storage.k8s.io/v1", "StorageClass")
    names = {each["metadata"]["name"] for each in classes}
    has_default = any(
        (each["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true" for each in classes
    )
    have = f"there are {', '.join(sorted(names))}" if names else "there is none"
    for claim in claims:
        name, wanted = claim["metadata"]["name"], claim["spec"].get("storageClassName")
        if wanted in names or (wanted is None and has_default):
            yield Answer("ok", f"{name}: StorageClass {wanted or 'of the cluster'} exists")
        elif wanted is None:
            yield Answer("error", f"{name}: no default StorageClass: name one, {have}")
        else:
            yield Answer("error", f"{name}: no StorageClass {wanted}: {have}")


# ---- rights


def _rights(cluster: Cluster, manifests: list[Manifest]) -> Iterator[Answer]:
    """Whether this user may apply each kind and follow what becomes of it."""
    namespace = next((each["metadata"].get("namespace") for each in manifests[::-1]), None)
    needed: dict[tuple[str, str], tuple[str, ...]] = {
        (each["apiVersion"], each["kind"]): ("get", "create", "patch")
        for each in manifests
        if each["kind"] not in CLUSTER_SCOPED
    }
    needed |= {("v1", "Pod"): ("list",), ("v1", "Event"): ("list",)}
    needed |= {("ray.io/v1", "RayCluster"): ("list", "patch")}
    lacking = [
        f"{verb} {kind}"
        for (api_version, kind), verbs in needed.items()
        for verb in verbs
        if not _may(cluster, api_version, kind, verb, namespace)
    ]
    if lacking:
        text = f"you may not, in namespace {namespace}: {', '.join(lacking)}"
        yield Answer("error", f"{text}; ask an administrator for a Role")
    else:
        yield Answer("ok", f"you may apply and follow everything in namespace {namespace}")


def _may(cluster: Cluster, api_version: str, kind: str, verb: str, namespace: str | None) -> bool:
    found = cluster.kind(api_version, kind)
    if found is None:  # an optional API that is left out
        return True
    group = api_version.rpartition("/")[0]
    asked = {"group": group, "resource": found.plural, "verb": verb, "namespace": namespace}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "metadata": {"name": ""},
        "spec": {"resourceAttributes": asked},
    }
    return bool(cluster.create(review)["status"]["allowed"])
