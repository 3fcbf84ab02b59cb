"""YAML files to objects that know their file and the line of every field."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ConfigError
from cluster.deploy.check.finding import Finding
from cluster.deploy.check.node import Keys, Node, dotted

SUFFIXES = (".yaml", ".yml")
KUSTOMIZE_FILES = ("kustomization.yaml", "kustomization.yml", "Kustomization")
MAX_VALUES = 1_000_000
"""Values in a document with its aliases written out; YAML can make billions of a few lines."""


@dataclass(frozen=True)
class Located:
    """An object and where it stands. What could not be read is an object with `faults`."""

    file: str
    body: Any
    document: yaml.Node | None = field(default=None, repr=False, compare=False)
    """The parsed YAML; knows the lines."""
    faults: tuple[Finding, ...] = ()

    @property
    def root(self) -> Node:
        """The object as a place."""
        return Node(self.body, (), self.where)

    @property
    def kind(self) -> str:
        return self.root["kind"].text

    @property
    def name(self) -> str:
        return self.root["metadata"]["name"].text

    @property
    def namespace(self) -> str:
        return self.root["metadata"]["namespace"].text

    def where(self, keys: Keys) -> tuple[str, str]:
        """File with line, and object, of a place."""
        name = f"{self.kind or 'object'}/{self.name or '?'}"
        if self.document is None:
            return self.file, name
        return f"{self.file}:{_line(self.document, keys)}", name


def load(paths: Iterable[Path | str]) -> list[Located]:
    """All objects of files and folders; "-" reads the standard input.

    Mistakes in the files become findings. Raises ConfigError for a path that cannot be read and
    for a Kustomize folder, which has to be rendered first.
    """
    found: list[Located] = []
    for path in paths:
        if str(path) == "-":
            found += load_text(sys.stdin.read(), "<stdin>")
            continue
        for file in _files(Path(path)):
            try:
                found += load_text(file.read_text(), str(file))
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{file}: cannot be read: {error}") from None
    return found


def load_text(text: str, file: str) -> list[Located]:
    """All objects of a YAML text. A document that is no YAML comes back as its finding."""
    found: list[Located] = []
    try:
        for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
            located = _construct(document, file)
            if located.faults or located.body is not None:
                found += _items(located)
    except yaml.YAMLError as error:
        found.append(_broken(file, error))
    except RecursionError:
        fault = Finding(file, "document", "nested too deeply", "check its indentation")
        found.append(Located(file, None, faults=(fault,)))
    return found


def parse_yaml(text: str) -> Any:
    """A YAML text that stands inside a manifest. Raises yaml.YAMLError, also for a key given
    twice."""
    try:
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        if document is None:
            return None
        if _count(document, {}, set()) > MAX_VALUES:
            raise yaml.YAMLError("its aliases contain themselves or make too many values")
        for key, line in _duplicates(document):
            raise yaml.YAMLError(f"line {line}: {key} is given twice")
        return _value(document)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder: name YAML files, folders or -")
    if any((path / name).is_file() for name in KUSTOMIZE_FILES):
        raise ConfigError(
            f"{path}: a Kustomize folder: render it first, kubectl kustomize {path} | "
            "shoal k8s check -"
        )
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not files:
        raise ConfigError(f"{path}: no {' or '.join(SUFFIXES)} files in this folder")
    if any(file.name in KUSTOMIZE_FILES for file in files):
        raise ConfigError(
            f"{path}: holds Kustomize folders: render an overlay of it and check that"
        )
    return files


def _construct(document: yaml.Node, file: str) -> Located:
    if _count(document, {}, set()) > MAX_VALUES:
        message = "its aliases contain themselves or make too many values"
        fault = Finding(file, "document", message, "write the values out")
        return Located(file, None, faults=(fault,))
    body = _value(document)
    located = Located(file, body, document)
    name = located.where(())[1]
    faults = tuple(
        Finding(f"{file}:{line}", name, f"{key} is given twice", "remove one of them")
        for key, line in _duplicates(document)
    )
    return Located(file, body, document, faults)


def _value(document: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(document)
    except ValueError as error:  # 2024-99-99 looks like a date
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _items(located: Located) -> Iterator[Located]:
    """The objects of a `kind: List`, as kubectl prints them; else the object itself."""
    items = located.root["items"]
    if located.kind != "List" or not isinstance(items.value, list):
        yield located
        return
    for i, body in enumerate(items.value):
        below = _step(_step(located.document, "items"), i)
        yield Located(located.file, body, below, located.faults if i == 0 else ())


def _broken(file: str, error: yaml.YAMLError) -> Located:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    why = " ".join(str(getattr(error, "problem", None) or error).split())
    fault = Finding(f"{file}{line}", "document", f"no YAML: {why}", "mend the syntax of this line")
    return Located(file, None, faults=(fault,))


def _count(node: yaml.Node, counted: dict[int, int], open_: set[int]) -> int:
    """Values below a node with aliases written out; more than MAX_VALUES if they are endless."""
    if id(node) in open_:
        return MAX_VALUES + 1
    if id(node) not in counted:
        open_.add(id(node))
        counted[id(node)] = 1 + sum(_count(child, counted, open_) for child in _children(node))
        open_.remove(id(node))
    return counted[id(node)]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _duplicates(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """Keys that a mapping has twice, with their lines: YAML keeps the last without a word."""
    todo, seen_nodes = [node], set()
    while todo:
        node = todo.pop()
        if id(node) in seen_nodes:
            continue
        seen_nodes.add(id(node))
        todo += reversed(_children(node))
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        seen: set[str] = set()
        for key in keys:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                yield key.value, key.start_mark.line + 1
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")


def _line(document: yaml.Node, keys: Keys) -> int:
    """The line of a place, or of the nearest one above it that is written down."""
    line = document.start_mark.line
    node: yaml.Node | None = document
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            marks = [at.start_mark.line for at, _ in node.value if at.value == key]
            line = marks[-1] if marks else line
        node = _step(node, key)
        if node is None:
            break
        if isinstance(key, int):
            line = node.start_mark.line
    return line + 1


def _step(node: yaml.Node | None, key: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        found = [value for at, value in node.value if at.value == key]
        return found[-1] if found else None
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        element: yaml.Node = node.value[key]
        return element
    return None


def shape_faults(located: Located) -> list[Finding]:
    """Why this is no object that JSON could carry: no mapping, keys or values of other types."""
    if not isinstance(located.body, dict):
        found = type(located.body).__name__
        return [located.root.finding(f"a {found}, not a mapping", "write an object with a kind")]
    faults = [
        located.root.with_value(None, *keys).finding(message, fix)
        for keys, message, fix in _not_json(located.body, ())
    ]
    for keys in (("apiVersion",), ("kind",), ("metadata", "name")):
        if not located.root.at(*keys).text:
            faults.append(located.root.at(*keys).finding("missing", f"add {dotted(keys)}"))
    return faults


def _not_json(value: Any, keys: Keys) -> Iterator[tuple[Keys, str, str]]:
    if isinstance(value, dict):
        for key, below in value.items():
            if isinstance(key, str):
                yield from _not_json(below, (*keys, key))
            else:
                yield keys, f"key {key!r} is no string", f'write "{key}" in quotes'
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from _not_json(below, (*keys, i))
    elif isinstance(value, float) and not math.isfinite(value):
        yield keys, f"{value} is no number of JSON", "write a finite number"
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        yield keys, f"YAML reads {value} as a {type(value).__name__}", f'write "{value}" in quotes'
