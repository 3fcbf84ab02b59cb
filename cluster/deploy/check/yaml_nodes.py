"""YAML documents that cannot do harm: no endless aliases, no key twice; and where values stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from cluster.deploy.check.node import Keys

MAX_VALUES = 1_000_000
"""Values in a document with its aliases written out; YAML can make billions of a few lines."""


def parse_yaml(text: str) -> Any:
    """A YAML text that stands inside a manifest. Raises yaml.YAMLError, also for a key given
    twice."""
    try:
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        if document is None:
            return None
        if count(document, {}, set()) > MAX_VALUES:
            raise yaml.YAMLError("its aliases contain themselves or make too many values")
        for key, line in duplicates(document):
            raise yaml.YAMLError(f"line {line}: {key} is given twice")
        return value_of(document)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def explain(error: yaml.YAMLError) -> tuple[str, int | None]:
    """What is wrong, and in which line if that is known."""
    mark = getattr(error, "problem_mark", None)
    why = getattr(error, "problem", None) or error
    return " ".join(str(why).split()), mark.line + 1 if mark else None


def value_of(document: yaml.Node) -> Any:
    """What a document says. Raises yaml.YAMLError."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(document)
    except ValueError as error:  # 2024-99-99 looks like a date
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def count(node: yaml.Node, counted: dict[int, int], open_: set[int]) -> int:
    """Values below a node with aliases written out; more than MAX_VALUES if they are endless."""
    if id(node) in open_:
        return MAX_VALUES + 1
    if id(node) not in counted:
        open_.add(id(node))
        counted[id(node)] = 1 + sum(count(child, counted, open_) for child in _children(node))
        open_.remove(id(node))
    return counted[id(node)]


def duplicates(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """Keys that a mapping has twice, with their lines: YAML keeps the last without a word."""
    todo, seen_nodes = [node], set()
    while todo:
        node = todo.pop()
        if id(node) in seen_nodes:
            continue
        seen_nodes.add(id(node))
        todo += reversed(_children(node))
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen: set[str] = set()
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                yield key.value, key.start_mark.line + 1
            seen.add(key.value)


def line_of(document: yaml.Node, keys: Keys) -> int:
    """The line of a place, or of the nearest one above it that is written down."""
    line = document.start_mark.line
    node: yaml.Node | None = document
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            marks = [at.start_mark.line for at, _ in node.value if at.value == key]
            line = marks[-1] if marks else line
        node = step(node, key)
        if node is None:
            break
        if isinstance(key, int):
            line = node.start_mark.line
    return line + 1


def step(node: yaml.Node | None, key: str | int) -> yaml.Node | None:
    """The value of a key or the element at an index; None if there is none."""
    if isinstance(node, yaml.MappingNode):
        found = [value for at, value in node.value if at.value == key]
        return found[-1] if found else None
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        element: yaml.Node = node.value[key]
        return element
    return None


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
