"""Generate cluster/protos/*_pb2.py, *_pb2_grpc.py and *_pb2.pyi from the .proto files beside them.

The generated files are committed; `--check` fails if they are not what the sources give.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = Path("cluster/protos")


def generate(out: Path) -> list[Path]:
    """Write the generated files under `out`; returns their paths relative to it."""
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / PROTOS).glob("*.proto"))
    includes = [f"-I{ROOT}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    code = protoc.main(["protoc", *includes, *outputs, *map(str, sources)])
    if code:
        raise SystemExit(code)
    return sorted(path.relative_to(out) for path in (out / PROTOS).glob("*_pb2*"))


def check() -> int:
    """0 if the committed files are up to date."""
    with tempfile.TemporaryDirectory() as folder:
        files = generate(Path(folder))
        stale = [f for f in files if not _equal(Path(folder) / f, ROOT / f)]
    for file in stale:
        print(f"{file} is not what its .proto gives: run `make protos`", file=sys.stderr)
    return 1 if stale else 0


def _equal(new: Path, committed: Path) -> bool:
    return committed.exists() and filecmp.cmp(new, committed, shallow=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if parser.parse_args().check:
        return check()
    generate(ROOT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
