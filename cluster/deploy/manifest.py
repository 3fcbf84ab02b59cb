"""Kubernetes objects as plain data: what they are called, in which order they are made, YAML."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

Manifest = dict[str, Any]

ORDER = (
    "Namespace",
    "PriorityClass",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "Secret",
    "ConfigMap",
    "PersistentVolumeClaim",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Service",
    "StatefulSet",
    "RayService",
    "PodMonitor",
    "PrometheusRule",
    "HTTPRoute",
    "GRPCRoute",
)
"""Kinds in the order in which they are made: what others refer to comes first."""
CLUSTER_SCOPED = ("Namespace", "PriorityClass")


def identity(manifest: Manifest) -> str:
    """`Kind/name`, unique in a deployment."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def in_order(manifests: Iterable[Manifest]) -> list[Manifest]:
    """As they are to be made; kinds that ORDER does not know come last."""

    def position(manifest: Manifest) -> tuple[int, str]:
        kind = manifest["kind"]
        return (ORDER.index(kind) if kind in ORDER else len(ORDER)), identity(manifest)

    return sorted(manifests, key=position)


def dump(manifests: Iterable[Manifest]) -> str:
    """One YAML stream. Strings of several lines keep their lines."""
    return "---\n".join(dump_one(manifest) for manifest in manifests)


def dump_one(data: Any) -> str:
    """One YAML document in block style, keys as given."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100, indent=2
    )


def load(text: str) -> list[Manifest]:
    """The objects of a YAML stream, empty documents left out. Raises yaml.YAMLError."""
    return [document for document in yaml.safe_load_all(text) if document is not None]


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # `&id001` is for nobody's eyes
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
