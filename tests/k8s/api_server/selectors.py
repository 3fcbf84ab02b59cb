"""Label and field selectors of list and watch."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.k8s.api_server.errors import Json, bad_request

Predicate = Callable[[Json], bool]
SET_BASED = re.compile(r"(?P<key>\S+)\s+(?P<operator>in|notin)\s+\((?P<values>[^)]*)\)")
COMPARISON = re.compile(r"(?P<key>[^=!]+?)\s*(?P<operator>==|=|!=)\s*(?P<value>.*)")
OUTSIDE_BRACKETS = re.compile(r",(?![^(]*\))")


def matcher(labels: str, fields: str) -> Predicate:
    """Whether an object matches both; an empty selector matches all."""
    by_label = [_requirement(part) for part in _parts(labels)]
    by_field = [_requirement(part) for part in _parts(fields)]

    def matches(obj: Json) -> bool:
        found = obj["metadata"].get("labels") or {}
        return all(r(found) for r in by_label) and all(r(_flat(obj)) for r in by_field)

    return matches


def _parts(selector: str) -> list[str]:
    return [part.strip() for part in OUTSIDE_BRACKETS.split(selector) if part.strip()]


def _requirement(text: str) -> Callable[[dict[str, str]], bool]:
    if found := SET_BASED.fullmatch(text):
        values = {value.strip() for value in found["values"].split(",")}
        key, wanted = found["key"], found["operator"] == "in"
        return lambda labels: (labels.get(key) in values) == wanted
    if found := COMPARISON.fullmatch(text):
        key, value, wanted = found["key"], found["value"], found["operator"] != "!="
        return lambda labels: (labels.get(key) == value) == wanted
    if re.fullmatch(r"!?[\w./-]+", text):
        key, wanted = text.lstrip("!"), not text.startswith("!")
        return lambda labels: (key in labels) == wanted
    raise bad_request(f"unable to parse requirement: {text!r}")


def _flat(obj: Json) -> dict[str, str]:
    """The fields that selectors may name."""
    metadata, status, spec = obj["metadata"], obj.get("status") or {}, obj.get("spec") or {}
    involved = obj.get("involvedObject") or {}
    return {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata.get("namespace", ""),
        "status.phase": status.get("phase", ""),
        "spec.nodeName": spec.get("nodeName", ""),
        "type": obj.get("type", ""),
        "reason": obj.get("reason", ""),
        **{f"involvedObject.{name}": str(value) for name, value in involved.items()},
    }
