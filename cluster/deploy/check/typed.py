"""What pydantic says against a tree of settings, in our words and with all faults at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.deploy.check.finding import Finding
from cluster.deploy.check.node import Keys, Node
from cluster.deploy.check.rayservice_model import MODELS, PARTS
from cluster.deploy.check.schemas import NEWEST, part_findings, shown, wrong_type
from cluster.field_names import fields_at, suggest

OTHER_KINDS = ("RayJob", "RayCronJob")
"""Kinds of KubeRay that Shoal does not look into."""
TYPES = {
    "string_type": "string",
    "int_type": "integer",
    "int_parsing": "integer",
    "int_from_float": "integer",
    "bool_type": "boolean",
    "bool_parsing": "boolean",
    "float_type": "number",
    "float_parsing": "number",
    "dict_type": "object",
    "model_type": "object",
    "model_attributes_type": "object",
    "list_type": "array",
    "tuple_type": "array",
}


def ray_findings(root: Node, version: str = NEWEST) -> list[Finding]:
    """What does not fit the schema of a RayService or RayCluster."""
    kind = root["kind"].text
    model = MODELS.get(kind)
    if model is None:
        is_known = kind in OTHER_KINDS or root["apiVersion"].text.partition("/")[0] != "ray.io"
        message = f"KubeRay has no kind {kind}"
        return [] if is_known else [root["kind"].finding(message, suggest(kind, MODELS))]
    found = list(typed_findings(model, root))
    for path, definition in PARTS[kind].items():
        for node in _places(root, path):
            found += part_findings(node, definition, version)
    return found + list(_fractions(root["spec"]))


def _fractions(node: Node) -> Iterator[Finding]:
    """Kubernetes takes `cpu: 1.5` in a pod, KubeRay's schema takes no fractions at all."""
    for below in node.each() + [child for _, child in node.entries()]:
        if isinstance(below.value, float):
            yield below.finding(f"{below.value} where text or an integer belongs", "quote it")
        yield from _fractions(below)


def typed_findings(model: type[BaseModel], node: Node) -> Iterator[Finding]:
    """What a model refuses in the tree at a place."""
    try:
        model.model_validate(node.value)
    except ValidationError as error:
        told: set[Keys] = set()
        for fault in error.errors(include_url=False):
            keys = _keys_in(node, fault["loc"])
            if keys not in told:  # a union tells the same of each of its members
                told.add(keys)
                yield _explain(model, node, keys, fault)


def _explain(model: type[BaseModel], root: Node, keys: Keys, fault: Any) -> Finding:
    node, kind = root.at(*keys), fault["type"]
    if kind == "extra_forbidden":
        fields = fields_at(model, keys[:-1])
        given = root.at(*keys[:-1]).value
        return node.finding("no such field", suggest(str(keys[-1]), fields, given))
    if kind == "missing":
        above = root.at(*keys[:-1])
        return above.finding(f"{keys[-1]} is missing", f"add {keys[-1]}")
    if kind in TYPES:
        return wrong_type(node, [TYPES[kind]])
    if kind == "literal_error":
        return node.finding(
            f"{shown(node.value)} is not allowed", f"one of {fault['ctx']['expected']}"
        )
    message, _, fix = fault["msg"].removeprefix("Value error, ").partition(": ")
    if not isinstance(node.value, (dict, list)):
        message = f"{shown(node.value)}: {message}"
    return node.finding(message, fix or "change this value")


def _keys_in(node: Node, loc: tuple[str | int, ...]) -> Keys:
    """The part of pydantic's location that is in the tree: it names members of unions too."""
    keys: list[str | int] = []
    for i, key in enumerate(loc):
        last = i == len(loc) - 1
        below = node.at(*keys).value
        is_there = isinstance(below, list) if isinstance(key, int) else isinstance(below, dict)
        if is_there and (last or isinstance(key, int) or key in below):
            keys.append(key)
    return tuple(keys)


def _places(root: Node, path: str) -> list[Node]:
    """The places that a path with `[]` stands for, where something is given."""
    nodes = [root]
    for step in path.split("."):
        nodes = [node[step.removesuffix("[]")] for node in nodes]
        if step.endswith("[]"):
            nodes = [element for node in nodes for element in node.each()]
    return [node for node in nodes if node.given]
