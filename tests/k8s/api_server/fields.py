"""Who owns which field: the sets that server-side apply merges, compares and takes apart.

A path is a tuple of the elements that `managedFields` uses: `f:name` a field, `k:{...}` the item of
a list by its keys, `v:"x"` an item of a set. What a schema does not describe is taken apart by
field, its lists are one value each.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from typing import Any

from tests.k8s.api_server.errors import Json
from tests.k8s.api_server.schemas import describe

Path = tuple[str, ...]
KEY_DEFAULTS = {"protocol": "TCP"}
"""Keys that may be left out of a list's item."""


def child(schema: Json, name: str) -> Json:
    """The schema of field `name`."""
    schema = describe(schema)
    found = schema.get("properties", {}).get(name)
    rest = schema.get("additionalProperties")
    return describe(found or (rest if isinstance(rest, dict) else {}))


def list_type(schema: Json) -> str:
    return str(describe(schema).get("x-kubernetes-list-type", "atomic"))


def is_granular(schema: Json) -> bool:
    return describe(schema).get("x-kubernetes-map-type") != "atomic"


def item_element(item: Json, schema: Json) -> str:
    """`k:{...}` of an item of a list whose items have keys."""
    properties = child_of_items(schema).get("properties", {})
    keys = {}
    for name in describe(schema)["x-kubernetes-list-map-keys"]:
        default = properties.get(name, {}).get("default", KEY_DEFAULTS.get(name))
        if item.get(name, default) is not None:
            keys[name] = item.get(name, default)
    return "k:" + json.dumps(keys, sort_keys=True, separators=(",", ":"))


def child_of_items(schema: Json) -> Json:
    return describe(describe(schema).get("items", {}))


def field_set(value: Any, schema: Json, path: Path = ()) -> set[Path]:
    """The leaves of `value`, and each item of a list with keys."""
    if isinstance(value, dict) and is_granular(schema):
        if not value and path:
            return {path}
        parts = (field_set(v, child(schema, k), (*path, f"f:{k}")) for k, v in value.items())
        return set().union(*parts)
    if isinstance(value, list) and list_type(schema) == "map":
        found: set[Path] = set()
        for item in value:
            element = (*path, item_element(item, schema))
            found |= {element} | field_set(item, child_of_items(schema), element)
        return found
    if isinstance(value, list) and list_type(schema) == "set":
        return {(*path, "v:" + json.dumps(item)) for item in value}
    return {path}


def duplicates(value: Any, schema: Json, path: Path = ()) -> Iterator[Path]:
    """Items of lists with keys that have the keys of an earlier one."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from duplicates(part, child(schema, name), (*path, f"f:{name}"))
    elif isinstance(value, list):
        seen: set[str] = set()
        for index, item in enumerate(value):
            element = f"v:{index}"
            if list_type(schema) == "map":
                element = item_element(item, schema)
                if element in seen:
                    yield (*path, element)
                seen.add(element)
            yield from duplicates(item, child_of_items(schema), (*path, element))


def _matches(item: Any, element: str) -> bool:
    if element.startswith("v:"):
        return bool(item == json.loads(element[2:]))
    keys = json.loads(element[2:]).items()
    return isinstance(item, dict) and all(item.get(k, KEY_DEFAULTS.get(k)) == v for k, v in keys)


def read(value: Any, path: Path) -> Any:
    """What is at `path`; None if nothing is."""
    for element in path:
        if element.startswith("f:"):
            value = value.get(element[2:]) if isinstance(value, dict) else None
        else:
            value = next((item for item in value or [] if _matches(item, element)), None)
    return value


def remove(value: Any, path: Path) -> None:
    """Take out what is at `path`, if anything is."""
    parent, last = read(value, path[:-1]), path[-1]
    if last.startswith("f:") and isinstance(parent, dict):
        parent.pop(last[2:], None)
    elif isinstance(parent, list):
        parent[:] = [item for item in parent if not _matches(item, last)]


def merge(live: Any, applied: Any, schema: Json) -> Any:
    """`live` with every field that `applied` states."""
    if isinstance(live, dict) and isinstance(applied, dict) and is_granular(schema):
        merged = {k: merge(live.get(k), v, child(schema, k)) for k, v in applied.items()}
        return {**live, **merged}
    if isinstance(live, list) and isinstance(applied, list):
        if list_type(schema) == "map":
            return _merge_items(live, applied, schema)
        if list_type(schema) == "set":
            return live + [item for item in applied if item not in live]
    return copy.deepcopy(applied)


def _merge_items(live: list[Any], applied: list[Any], schema: Json) -> list[Any]:
    merged = {item_element(item, schema): item for item in live}
    for item in applied:
        element = item_element(item, schema)
        merged[element] = merge(merged.get(element), item, child_of_items(schema))
    return list(merged.values())


def to_fields_v1(paths: Iterable[Path]) -> Json:
    """The tree of `managedFields[].fieldsV1`; `.` marks what is itself in the set."""
    paths = set(paths)
    root: Json = {}
    for path in sorted(paths):
        node = root
        for element in path:
            node = node.setdefault(element, {})
        if any(other != path and other[: len(path)] == path for other in paths):
            node["."] = {}
    return root


def from_fields_v1(tree: Json, path: Path = ()) -> set[Path]:
    if not tree:
        return {path}
    found: set[Path] = set()
    for element, below in tree.items():
        found |= {path} if element == "." else from_fields_v1(below, (*path, element))
    return found


def readable(path: Path) -> str:
    """As in a conflict: `.spec.ports[containerPort=8000,protocol="TCP"].name`."""
    text = ""
    for element in path:
        if element.startswith("f:"):
            text += "." + element[2:]
        elif element.startswith("v:"):
            text += f"[={element[2:]}]"
        else:
            keys = json.loads(element[2:]).items()
            text += "[" + ",".join(f"{k}={json.dumps(v)}" for k, v in keys) + "]"
    return text
