"""`python -m cluster` and the `shoal` command."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

PACKAGES = ("experts", "router", "attention", "cluster")


def check_packages() -> None:
    """All four packages must be ours: their names are common ones."""
    roots = {
        name: Path(importlib.import_module(name).__file__ or "").resolve().parent.parent
        for name in PACKAGES
    }
    if len(set(roots.values())) > 1:
        places = ", ".join(f"{name} in {root}" for name, root in roots.items())
        sys.exit(f"shoal: the packages of another distribution are in the way: {places}")


def main() -> None:
    """Entry point of the `shoal` command."""
    check_packages()
    from cluster.cli import app

    app()


if __name__ == "__main__":
    main()
