"""The schemas of Kubernetes' own kinds, strict: from the `kubernetes-validate` package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import referencing

from tests.k8s.api_server.errors import Json
from tests.k8s.api_server.resources import ResourceType

MINOR = 37
FOLDER = (
    Path(kubernetes_validate.__file__).parent
    / "kubernetes-json-schema"
    / f"v1.{MINOR}.0-local-strict"
)
OBJECT_META = {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
UNKNOWN_FIELD = "additionalProperties"
"""jsonschema's name for the rule that a field not in the schema breaks."""


@cache
def definitions() -> Json:
    loaded: Json = json.loads((FOLDER / "_definitions.json").read_text())
    return loaded


@cache
def builtin_schema(resource: ResourceType) -> Json:
    """The schema of one of Kubernetes' own kinds."""
    group = resource.group.split(".")[0]
    version = f"{group}-{resource.version}" if group else resource.version
    loaded: Json = json.loads((FOLDER / f"{resource.kind.lower()}-{version}.json").read_text())
    return loaded


def describe(schema: Json) -> Json:
    """`schema`, or what it refers to."""
    while "$ref" in schema:
        schema = definitions()["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


@cache
def _validator(resource: ResourceType) -> Any:
    schema = builtin_schema(resource)
    registry: Any = referencing.Registry()
    for document in (definitions(), schema):
        registry = referencing.Resource.from_contents(document) @ registry
    return jsonschema.Draft202012Validator(schema, registry=registry)


def schema_errors(resource: ResourceType, obj: Json) -> Iterator[jsonschema.ValidationError]:
    """What a built-in object's schema finds wrong with it."""
    yield from _validator(resource).iter_errors(obj)
