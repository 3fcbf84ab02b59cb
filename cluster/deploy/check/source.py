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
from cluster.deploy.check.yaml_nodes import (
    MAX_VALUES,
    count,
    duplicates,
    explain,
    line_of,
    step,
    value_of,
)

SUFFIXES = (".yaml", ".yml")
KUSTOMIZE_FILES = ("kustomization.yaml", "kustomization.yml", "Kustomization")


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
        return f"{self.file}:{line_of(self.document, keys)}", name


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
    if count(document, {}, set()) > MAX_VALUES:
        message = "its aliases contain themselves or make too many values"
        fault = Finding(file, "document", message, "write the values out")
        return Located(file, None, faults=(fault,))
    body = value_of(document)
    located = Located(file, body, document)
    name = located.where(())[1]
    faults = tuple(
        Finding(f"{file}:{line}", name, f"{key} is given twice", "remove one of them")
        for key, line in duplicates(document)
    )
    return Located(file, body, document, faults)


def _items(located: Located) -> Iterator[Located]:
    """The objects of a `kind: List`, as kubectl prints them; else the object itself."""
    items = located.root["items"]
    if located.kind != "List" or not isinstance(items.value, list):
        yield located
        return
    for i, body in enumerate(items.value):
        below = step(step(located.document, "items"), i)
        yield Located(located.file, body, below, located.faults if i == 0 else ())


def _broken(file: str, error: yaml.YAMLError) -> Located:
    why, line = explain(error)
    place = file if line is None else f"{file}:{line}"
    fault = Finding(place, "document", f"no YAML: {why}", "mend the syntax of this line")
    return Located(file, None, faults=(fault,))


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
