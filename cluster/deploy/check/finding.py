"""One mistake in a manifest, told so that the reader can go and mend it."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable
from dataclasses import dataclass

MAX_NAMES = 12
"""Known names that a message lists."""


@dataclass(frozen=True)
class Finding:
    """A mistake; str() is one line with file, object, path, what is wrong and what to do."""

    file: str
    """File and line, as editors take it: `k8s/base/rayservice.yaml:12`."""
    path: str
    """Object and field: `RayService/shoal spec.rayClusterConfig.rayVersion`."""
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}: {self.path}: {self.message}; {self.fix}"


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
