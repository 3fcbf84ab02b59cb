"""Names of settings: what a mistyped one was meant to be, and which there are."""

from __future__ import annotations

import difflib
import types
from collections.abc import Container, Iterable, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

MAX_NAMES = 12
"""Known names that a message lists."""


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that `word` was probably meant to be."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return close[0] if close else None


def suggest(word: str, names: Iterable[str], taken: Container[str] = ()) -> str:
    """What to write in the place of an unknown `word`; `taken`: names that are there already."""
    known = sorted(set(names))
    meant = nearest(word, known)
    if meant is not None:
        return f"remove it, {meant} is there" if meant in taken else f"did you mean {meant}?"
    known = [name for name in known if name not in taken]
    if not known:
        return "remove it"
    rest = f" and {len(known) - MAX_NAMES} more" if len(known) > MAX_NAMES else ""
    return f"known here: {', '.join(known[:MAX_NAMES])}{rest}"


def fields_at(model: type[BaseModel], keys: Sequence[str | int]) -> set[str]:
    """Names of the fields of the model at a place; empty if none is there."""
    found: list[type[BaseModel]] = [model]
    for key in keys:
        found = [below for one in found for below in _below(one, key)]
    return {info.alias or name for one in found for name, info in one.model_fields.items()}


def _below(model: type[BaseModel], key: str | int) -> list[type[BaseModel]]:
    if isinstance(key, int):  # a list's element: `_models` went through the list already
        return [model]
    for name, info in model.model_fields.items():
        if key == (info.alias or name):
            return _models(info.annotation)
    return []


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in a type: of a union, a list, an optional."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list, tuple, Annotated):
        return [model for arg in get_args(annotation) for model in _models(arg)]
    return []
