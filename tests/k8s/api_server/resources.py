"""The kinds that the server knows, and the discovery documents that list them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.k8s.api_server.errors import Json

VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


@dataclass(frozen=True)
class ResourceType:
    """One kind in one version of its API group; the core group's name is empty."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full_name(self) -> str:
        """As in error messages: `rayservices.ray.io`, `pods`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def path(self) -> str:
        return f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"


RBAC = "rbac.authorization.k8s.io"
NAMESPACE = ResourceType("", "v1", "Namespace", "namespaces", namespaced=False)
POD = ResourceType("", "v1", "Pod", "pods")
PRIORITY_CLASS = ResourceType(
    "scheduling.k8s.io", "v1", "PriorityClass", "priorityclasses", namespaced=False
)
ROLE = ResourceType(RBAC, "v1", "Role", "roles")
CLUSTER_ROLE = ResourceType(RBAC, "v1", "ClusterRole", "clusterroles", namespaced=False)
ROLE_BINDING = ResourceType(RBAC, "v1", "RoleBinding", "rolebindings")
CLUSTER_ROLE_BINDING = ResourceType(
    RBAC, "v1", "ClusterRoleBinding", "clusterrolebindings", namespaced=False
)
CUSTOM_RESOURCE_DEFINITION = ResourceType(
    "apiextensions.k8s.io",
    "v1",
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
)
ACCESS_REVIEW = ResourceType(
    "authorization.k8s.io",
    "v1",
    "SelfSubjectAccessReview",
    "selfsubjectaccessreviews",
    namespaced=False,
)
BUILTIN = (
    NAMESPACE,
    POD,
    ResourceType("", "v1", "Node", "nodes", namespaced=False),
    ResourceType("", "v1", "PersistentVolume", "persistentvolumes", namespaced=False),
    ResourceType("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
    ResourceType("", "v1", "Service", "services"),
    ResourceType("", "v1", "Secret", "secrets"),
    ResourceType("", "v1", "ConfigMap", "configmaps"),
    ResourceType("", "v1", "ServiceAccount", "serviceaccounts"),
    ResourceType("", "v1", "Event", "events"),
    ResourceType("apps", "v1", "Deployment", "deployments"),
    ResourceType("apps", "v1", "StatefulSet", "statefulsets"),
    ResourceType("batch", "v1", "Job", "jobs"),
    ResourceType("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
    ResourceType("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    ResourceType("storage.k8s.io", "v1", "StorageClass", "storageclasses", namespaced=False),
    PRIORITY_CLASS,
    ROLE,
    CLUSTER_ROLE,
    ROLE_BINDING,
    CLUSTER_ROLE_BINDING,
    CUSTOM_RESOURCE_DEFINITION,
    ACCESS_REVIEW,
)


def group_list(types: Iterable[ResourceType]) -> Json:
    """GET /apis"""
    versions: dict[str, list[str]] = {}
    for resource in types:
        known = versions.setdefault(resource.group, [])
        if resource.version not in known:
            known.append(resource.version)
    versions.pop("", None)
    groups = []
    for name, numbers in versions.items():
        listed = [{"groupVersion": f"{name}/{number}", "version": number} for number in numbers]
        groups.append({"name": name, "versions": listed, "preferredVersion": listed[0]})
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def resource_list(types: Iterable[ResourceType], group: str, version: str) -> Json:
    """GET /api/v1 or /apis/GROUP/VERSION"""
    listed: list[Json] = []
    for resource in types:
        if (resource.group, resource.version) == (group, version):
            listed += [_entry(resource, "", VERBS)]
            listed += [_entry(resource, "/status", ["get", "patch", "update"])]
            if resource == POD:
                listed += [_entry(resource, "/log", ["get"])]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{group}/{version}" if group else version,
        "resources": listed,
    }


def _entry(resource: ResourceType, suffix: str, verbs: list[str]) -> Json:
    return {
        "name": resource.plural + suffix,
        "singularName": resource.kind.lower(),
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": verbs,
    }
