"""Built-in kinds, and the built-in parts of a RayService, against a Kubernetes version's schemas.

The schemas come with the package kubernetes-validate. They are strict: unknown fields are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from importlib.resources import files
from typing import Any

from cluster.config import ConfigError
from cluster.deploy.check.finding import Finding
from cluster.deploy.check.node import Node
from cluster.field_names import suggest

VERSIONS = tuple(f"1.{minor}" for minor in range(30, 38))
NEWEST = VERSIONS[-1]
KIND_OF_TYPE = {
    "string": "text",
    "object": "a mapping",
    "array": "a list",
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "null": "null",
}
DOTTED_GROUPS = {
    f"{name}.k8s.io"
    for name in (
        "admissionregistration",
        "apiextensions",
        "apiregistration",
        "authentication",
        "authorization",
        "certificates",
        "coordination",
        "discovery",
        "events",
        "flowcontrol.apiserver",
        "networking",
        "node",
        "rbac.authorization",
        "resource",
        "scheduling",
        "storage",
    )
}
"""Groups of Kubernetes itself that have a dot; those without a dot (apps, policy) all are."""


def schema_findings(root: Node, version: str = NEWEST) -> list[Finding]:
    """What does not fit the schema of an object's kind; nothing for kinds of other groups."""
    api_version, kind = root["apiVersion"].text, root["kind"].text
    group = api_version.rpartition("/")[0]
    if "." in group and group not in DOTTED_GROUPS:
        return []
    name = f"{kind.lower()}-{api_version.replace('/', '-')}"
    if group:
        name = f"{kind.lower()}-{group.partition('.')[0]}-{api_version.rpartition('/')[2]}"
    schema = _schema(version, name) if kind and api_version else None
    if schema is None or "x-kubernetes-group-version-kind" not in schema:
        known = _kinds(version)
        message = f"Kubernetes {version} has no {kind or '?'} in apiVersion {api_version or '?'}"
        homes = sorted(api for known_kind, api in known if known_kind == kind)
        fix = f"use apiVersion {homes[-1]}" if homes else suggest(kind, (k for k, _ in known))
        return [root["kind"].finding(message, fix)]
    return list(_findings(root, schema, version))


def part_findings(node: Node, definition: str, version: str = NEWEST) -> list[Finding]:
    """What does not fit a part of Kubernetes, such as `api.core.v1.PodTemplateSpec`."""
    schema = {"$ref": f"/api/_definitions.json#/$defs/io.k8s.{definition}"}
    return list(_findings(node, schema | {"$id": "https://kubernetes.io/api/part"}, version))


def _findings(node: Node, schema: dict[str, Any], version: str) -> Iterator[Finding]:
    validator = _validator_class()(schema, registry=_registry(version))
    for error in validator.iter_errors(node.value):
        yield from _explain(node.at(*error.absolute_path), error)


def _explain(node: Node, error: Any) -> Iterator[Finding]:
    """An error of jsonschema in our words."""
    wanted, rule = error.validator_value, error.validator
    if rule == "additionalProperties":
        known = set(error.schema.get("properties", {}))
        for key in sorted(set(node.value) - known):
            yield node[key].finding("no such field", suggest(key, known, node.value))
    elif rule == "required":
        missing = [key for key in wanted if key not in node.value]
        if missing and error.message.startswith(repr(missing[0])):  # one error for each of them
            yield node.finding(f"{', '.join(missing)} is missing", f"add {', '.join(missing)}")
    elif rule == "type":
        yield wrong_type(node, [wanted] if isinstance(wanted, str) else list(wanted))
    elif rule in ("oneOf", "anyOf"):
        types = [t for way in wanted for t in way.get("type", ())]
        yield wrong_type(node, types)
    elif rule == "enum":
        yield node.finding(f"{shown(node.value)} is not allowed", f"one of {', '.join(wanted)}")
    elif rule == "x-kubernetes-list-map-keys":
        yield node.finding(error.message, "remove or rename one")
    else:
        yield node.finding(" ".join(error.message.split())[:200], "see the field's documentation")


def wrong_type(node: Node, types: list[str]) -> Finding:
    """A value of another type than the field's."""
    names = list(dict.fromkeys(KIND_OF_TYPE.get(t, t) for t in types if t != "null"))
    value = node.value
    fix = "write " + " or ".join(names)
    if "text" in names and isinstance(value, (bool, int, float)):
        fix = f'quote it: "{json.dumps(value)}"'
    elif isinstance(value, str) and (
        ("an integer" in names and value.lstrip("-").isdigit())
        or ("true or false" in names and value in ("true", "false"))
    ):
        fix = f"write it without quotes: {value}"
    return node.finding(f"{shown(value)} where {' or '.join(names)} belongs", fix)


def shown(value: Any) -> str:
    """A value for a message: short ones as they are, large ones by their type."""
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}..."'
    return KIND_OF_TYPE["object" if isinstance(value, dict) else "array"]


def _duplicates(validator: Any, keys: list[str], items: Any, schema: Any) -> Iterator[Any]:
    """Elements of a list that the server keeps as a map must differ in their keys."""
    if not isinstance(items, list):
        return
    seen: list[tuple[Any, ...]] = []
    for item in items:
        if not isinstance(item, dict):
            continue
        defaults = {"protocol": "TCP"}
        key = tuple(item.get(name, defaults.get(name)) for name in keys)
        if key in seen:
            pairs = ", ".join(f"{name} {value}" for name, value in zip(keys, key, strict=True))
            yield import_module("jsonschema").ValidationError(f"two elements with {pairs}")
        seen.append(key)


@lru_cache(maxsize=1)
def _validator_class() -> Any:
    jsonschema = _imported("jsonschema")
    return jsonschema.validators.extend(
        jsonschema.Draft202012Validator, {"x-kubernetes-list-map-keys": _duplicates}
    )


@lru_cache(maxsize=2)
def _registry(version: str) -> Any:
    referencing = _imported("referencing")
    definitions = referencing.Resource.from_contents(_schema(version, "_definitions"))
    return definitions @ referencing.Registry()


@lru_cache(maxsize=256)
def _schema(version: str, name: str) -> dict[str, Any] | None:
    folder = _folder(version)
    try:
        text = (folder / f"{name}.json").read_text()
    except (OSError, ValueError):  # no such kind, or a name that is no file name
        return None
    schema = json.loads(text)
    return schema if isinstance(schema, dict) else None


@lru_cache(maxsize=2)
def _kinds(version: str) -> frozenset[tuple[str, str]]:
    """(kind, apiVersion) of everything that can be created."""
    defined = (_schema(version, "_definitions") or {}).get("$defs", {})
    gvks = [gvk for d in defined.values() for gvk in d.get("x-kubernetes-group-version-kind", ())]
    return frozenset(
        (gvk["kind"], f"{gvk['group']}/{gvk['version']}".lstrip("/"))
        for gvk in gvks
        if not gvk["kind"].endswith(("List", "Options", "Status"))
    )


def _folder(version: str) -> Any:
    if version not in VERSIONS:
        raise ConfigError(f"Kubernetes {version}: checked are {VERSIONS[0]} to {VERSIONS[-1]}")
    _imported("kubernetes_validate")
    return files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(
            f"{name} is not installed, the schemas come with it: pip install 'shoal-serve[k8s]'"
        ) from None
