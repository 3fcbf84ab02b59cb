"""Generate k8s/base, k8s/components and k8s/overlays from the presets in cluster/deploy/presets.

The generated files are committed; `--check` fails if they are not what the presets give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cluster.deploy.config import PRESETS, preset_config
from cluster.deploy.tree import tree

K8S = Path(__file__).resolve().parent.parent / "k8s"
GENERATED = ("base", "components", "overlays")


def wanted() -> dict[str, str]:
    """Path below k8s/ -> text."""
    return tree({name: preset_config(name) for name in PRESETS})


def present(k8s: Path = K8S) -> dict[str, str]:
    """The same of the files that are there."""
    files = [p for folder in GENERATED for p in (k8s / folder).rglob("*") if p.is_file()]
    return {str(path.relative_to(k8s)): path.read_text() for path in files}


def stale(k8s: Path = K8S) -> list[str]:
    """Paths of files that are missing, too many, or other than they should be."""
    want, have = wanted(), present(k8s)
    return sorted(path for path in want.keys() | have.keys() if want.get(path) != have.get(path))


def write(k8s: Path = K8S) -> None:
    """Make the tree what it should be; files that nothing gives any more are removed."""
    want = wanted()
    for path in present(k8s).keys() - want.keys():
        (k8s / path).unlink()
    for path, text in want.items():
        target = k8s / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def main() -> int:
    """0 if the tree is up to date now."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, report")
    if not parser.parse_args().check:
        write()
    old = stale()
    for path in old:
        print(
            f"k8s/{path} is not what the presets give: run tools/generate_k8s.py", file=sys.stderr
        )
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
