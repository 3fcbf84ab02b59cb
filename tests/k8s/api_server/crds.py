"""Custom resources: structural schemas with defaults, lists with keys, and rules in CEL.

The rules are checked where the package `celpy` is installed; elsewhere they are passed over.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jsonschema

from tests.k8s.api_server import fields
from tests.k8s.api_server.errors import Json
from tests.k8s.api_server.fields import child, child_of_items
from tests.k8s.api_server.resources import ResourceType
from tests.k8s.api_server.schemas import OBJECT_META

try:
    import celpy
    import celpy.adapter
except ImportError:
    celpy = None

KEPT = ("type", "required", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems")
KEPT_TOO = ("minLength", "maxLength", "minProperties", "maxProperties", "uniqueItems")
NESTED = ("allOf", "anyOf", "oneOf")


class CustomResource:
    """The kind that a CustomResourceDefinition defines, in the version that is stored."""

    def __init__(self, definition: Json) -> None:
        spec = definition["spec"]
        version = next(v for v in spec["versions"] if v["storage"])
        names = spec["names"]
        namespaced = spec["scope"] == "Namespaced"
        self.type = ResourceType(
            spec["group"], version["name"], names["kind"], names["plural"], namespaced
        )
        self.structure: Json = version["schema"]["openAPIV3Schema"]
        self.has_status = "status" in version.get("subresources", {})

    @cached_property
    def schema(self) -> Json:
        """The structural schema; its metadata is that of every object."""
        properties = {**self.structure.get("properties", {}), "metadata": OBJECT_META}
        return {**self.structure, "properties": properties}

    @cached_property
    def _validator(self) -> Any:
        converted = to_json_schema(self.structure)
        everywhere: Json = {"apiVersion": {}, "kind": {}, "metadata": {}}
        converted["properties"] = {**converted.get("properties", {}), **everywhere}
        return jsonschema.Draft202012Validator(converted)

    def errors(self, obj: Json) -> Iterator[jsonschema.ValidationError]:
        yield from self._validator.iter_errors(obj)

    def rule_errors(self, obj: Json, old: Json | None) -> list[tuple[str, str]]:
        """Path and text of what the keys of lists and the rules in CEL refuse."""
        spec = self.structure.get("properties", {}).get("spec", {})
        found = list(_walk(spec, obj.get("spec"), (old or {}).get("spec"), "spec"))
        twice = fields.duplicates(obj.get("spec"), spec, ("f:spec",))
        return found + [(fields.readable(path), "Duplicate value") for path in twice]

    def with_defaults(self, obj: Json) -> Json:
        obj = copy.deepcopy(obj)
        _fill(obj, self.structure)
        return obj


def to_json_schema(schema: Json, strict: bool = True) -> Json:
    """A structural schema for jsonschema; `strict` refuses unknown fields."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **_subset(schema, ("pattern",))}
    out = _subset(schema, KEPT + KEPT_TOO)
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    if "properties" in schema:
        out["properties"] = {k: to_json_schema(v, strict) for k, v in schema["properties"].items()}
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
        out["additionalProperties"] = bool(not strict or open_ended)
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = to_json_schema(schema["additionalProperties"], strict)
    if "items" in schema:
        out["items"] = to_json_schema(schema["items"], strict)
    for name in NESTED:
        if name in schema:
            out[name] = [to_json_schema(part, strict=False) for part in schema[name]]
    if "not" in schema:
        out["not"] = to_json_schema(schema["not"], strict=False)
    return out


def _subset(schema: Json, names: tuple[str, ...]) -> Json:
    return {name: schema[name] for name in names if name in schema}


def _fill(value: Any, schema: Json) -> None:
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name not in value and "default" in part:
                value[name] = copy.deepcopy(part["default"])
        for name in value:
            _fill(value[name], child(schema, name) if name != "metadata" else {})
    elif isinstance(value, list):
        for item in value:
            _fill(item, child_of_items(schema))


def _walk(schema: Json, value: Any, old: Any, path: str) -> Iterator[tuple[str, str]]:
    if value is None:
        return
    for rule in schema.get("x-kubernetes-validations", ()):
        if not _holds(rule["rule"], value, old):
            yield path, rule.get("message", rule["rule"])
    if isinstance(value, dict):
        for name, part in value.items():
            before = old.get(name) if isinstance(old, dict) else None
            yield from _walk(child(schema, name), part, before, f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(child_of_items(schema), item, None, f"{path}[{index}]")


def _holds(rule: str, value: Any, old: Any) -> bool:
    """A rule about the old value says nothing of an object that is new."""
    about_old = "oldSelf" in rule
    if celpy is None or (about_old and old is None):
        return True
    environment = celpy.Environment()
    known = {"self": value, **({"oldSelf": old} if about_old else {})}
    activation = {name: celpy.adapter.json_to_cel(part) for name, part in known.items()}
    return bool(environment.program(environment.compile(rule)).evaluate(activation))
