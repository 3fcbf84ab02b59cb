"""Who runs as whom: Namespace, the workers' service account, the deployer's rights."""

from __future__ import annotations

from typing import Any

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest
from cluster.deploy.manifests.names import labels, manifest, worker_account

READ = ["get", "list", "watch"]
WRITE = [*READ, "create", "patch", "delete"]
DEPLOYER_RULES = (
    (["ray.io"], ["rayservices", "rayclusters"], WRITE),
    ([""], ["serviceaccounts", "configmaps", "persistentvolumeclaims", "services"], WRITE),
    ([""], ["secrets"], ["get", "create", "delete"]),
    (["apps"], ["statefulsets"], WRITE),
    (["policy"], ["poddisruptionbudgets"], WRITE),
    (["networking.k8s.io"], ["networkpolicies"], WRITE),
    (["monitoring.coreos.com"], ["podmonitors", "prometheusrules"], WRITE),
    (["gateway.networking.k8s.io"], ["httproutes", "grpcroutes"], WRITE),
    ([""], ["pods", "events"], READ),
    ([""], ["pods/log"], ["get"]),
    ([""], ["pods/portforward"], ["get", "create"]),
)
"""(API groups, resources, verbs): what `shoal k8s` needs in the namespace, and no more."""


def namespace(config: DeployConfig) -> list[Manifest]:
    """hostPath volumes are allowed in privileged namespaces only; nothing else of ours needs more
    than `restricted`, but KubeRay's own containers have not promised that."""
    if not config.admin_objects:
        return []
    level = "privileged" if config.storage.host_path else "baseline"
    admission = {"enforce": level, "warn": "restricted", "audit": "restricted"}
    security = {f"pod-security.kubernetes.io/{mode}": value for mode, value in admission.items()}
    metadata = {"name": config.namespace, "labels": labels(config) | security}
    return [{"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}]


def accounts(config: DeployConfig) -> list[Manifest]:
    """Workers need nothing of the API server. KubeRay makes the head's own account."""
    return [
        manifest(
            "v1",
            "ServiceAccount",
            config,
            worker_account(config),
            automountServiceAccountToken=False,
        )
    ]


def deployer(config: DeployConfig) -> list[Manifest]:
    """An account for CI, with the rights that `shoal k8s` needs when no administrator runs it."""
    if not config.admin_objects:
        return []
    name = f"{config.name}-deployer"
    rules = [
        {"apiGroups": groups, "resources": resources, "verbs": verbs}
        for groups, resources, verbs in DEPLOYER_RULES
    ]
    role: dict[str, Any] = {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "Role",
        "name": name,
    }
    subject = {"kind": "ServiceAccount", "name": name, "namespace": config.namespace}
    rbac = "rbac.authorization.k8s.io/v1"
    return [
        manifest("v1", "ServiceAccount", config, name, automountServiceAccountToken=False),
        manifest(rbac, "Role", config, name, rules=rules),
        manifest(rbac, "RoleBinding", config, name, roleRef=role, subjects=[subject]),
    ]
