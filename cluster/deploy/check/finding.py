"""One mistake in a manifest, told so that the reader can go and mend it."""

from __future__ import annotations

from dataclasses import dataclass


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
