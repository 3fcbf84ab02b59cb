"""A place in an object. Rules walk over objects of any shape: asking a missing place never raises.

A child that is not there is a Node with value None, so that `spec["a"]["b"].text` is always legal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.deploy.check.finding import Finding

Key = str | int
Keys = tuple[Key, ...]


@dataclass(frozen=True)
class Node:
    """A value and the way to it."""

    value: Any
    keys: Keys
    where: Callable[[Keys], tuple[str, str]]
    """File with line and object (`RayService/shoal`) of such a place."""

    def __getitem__(self, key: Key) -> Node:
        return self.with_value(self._child(key), key)

    def _child(self, key: Key) -> Any:
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int):
            return self.value[key] if 0 <= key < len(self.value) else None
        return None

    def with_value(self, value: Any, *keys: Key) -> Node:
        """The place below, with a value of another source: the text of a field, parsed."""
        return Node(value, self.keys + keys, self.where)

    def at(self, *keys: Key) -> Node:
        """The place that some steps lead to."""
        node = self
        for key in keys:
            node = node[key]
        return node

    def each(self) -> list[Node]:
        """Elements, if this is a list."""
        return [self[i] for i in range(len(self.value))] if isinstance(self.value, list) else []

    def entries(self) -> list[tuple[str, Node]]:
        """Keys and children, if this is a mapping; keys that are not text are left out."""
        if not isinstance(self.value, dict):
            return []
        return [(key, self[key]) for key in self.value if isinstance(key, str)]

    def texts(self) -> dict[str, str]:
        """The part of a mapping that is text to text: labels, selectors, start parameters."""
        return {key: node.value for key, node in self.entries() if isinstance(node.value, str)}

    @property
    def given(self) -> bool:
        """Something other than null stands here."""
        return self.value is not None

    @property
    def text(self) -> str:
        """The text; empty if this is something else."""
        return self.value if isinstance(self.value, str) else ""

    @property
    def number(self) -> int | None:
        """The integer; None if this is something else."""
        is_int = isinstance(self.value, int) and not isinstance(self.value, bool)
        return self.value if is_int else None

    def named(self, name: str) -> Node:
        """The element of a list of mappings with this `name`; a missing place without one."""
        found = [node for node in self.each() if node["name"].text == name]
        return found[0] if found else self.with_value(None, name)

    def finding(self, message: str, fix: str) -> Finding:
        """A mistake here."""
        file, name = self.where(self.keys)
        return Finding(file, f"{name} {dotted(self.keys)}".rstrip(), message, fix)


def dotted(keys: Keys) -> str:
    """`spec.ports[0].name`; keys with dots are quoted."""
    path = ""
    for key in keys:
        if isinstance(key, int):
            path += f"[{key}]"
        elif all(part.isalnum() or part in "-_" for part in key) and key:
            path += f".{key}" if path else key
        else:
            path += f'["{key}"]'
    return path
