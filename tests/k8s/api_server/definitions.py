"""KubeRay's CustomResourceDefinitions: its own where they lie beside the repository, else stand-ins
of ours that take any field."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.api_server.client import RAY_CLUSTER, RAY_SERVICE, Client
from tests.k8s.api_server.errors import Json
from tests.k8s.api_server.resources import ResourceType

KUBERAY_FOLDER = Path(__file__).parents[4] / "shared" / "kuberay-crds"
RESOURCES = (RAY_SERVICE, RAY_CLUSTER)
FIRST_MINOR_WITH_CEL = 25


def has_kuberay_schemas() -> bool:
    return all(_file(resource).is_file() for resource in RESOURCES)


def register(client: Client, minor: int) -> None:
    """Define RayService and RayCluster on the server; returns once they can be used."""
    for resource in RESOURCES:
        if client.find("CustomResourceDefinition", resource.full_name) is None:
            definition = _definition(resource)
            if minor < FIRST_MINOR_WITH_CEL:
                definition = _without(definition, "x-kubernetes-validations")
            client.create(definition)
        while not is_established(client, resource):
            time.sleep(0.1)  # a real server takes a moment


def is_established(client: Client, resource: ResourceType) -> bool:
    found = client.get("CustomResourceDefinition", resource.full_name)
    conditions = found.get("status", {}).get("conditions") or []
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


def _definition(resource: ResourceType) -> Json:
    if not has_kuberay_schemas():
        return _permissive(resource)
    fast_loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = _file(resource).read_text()
    loaded: Json = yaml.load(text, Loader=fast_loader)  # noqa: S506
    return loaded


def _file(resource: ResourceType) -> Path:
    return KUBERAY_FOLDER / f"{resource.group}_{resource.plural}.yaml"


def _permissive(resource: ResourceType) -> Json:
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"type": "object", "properties": {"spec": anything, "status": anything}}
    version = {
        "name": resource.version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
    }
    names = {
        "kind": resource.kind,
        "listKind": f"{resource.kind}List",
        "plural": resource.plural,
        "singular": resource.kind.lower(),
    }
    spec = {"group": resource.group, "names": names, "scope": "Namespaced", "versions": [version]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": resource.full_name},
        "spec": spec,
    }


def _without(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, name) for k, v in value.items() if k != name}
    if isinstance(value, list):
        return [_without(item, name) for item in value]
    return value
