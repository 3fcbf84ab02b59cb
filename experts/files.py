"""Read the small parts of a checkpoint's files: JSON objects and safetensors headers.

Nothing in these files is trusted: every length, offset and type is checked against the size of the
file before it is used, so a damaged or hostile file costs milliseconds and one line of text.
Format of a safetensors file: 8 bytes, the little-endian length N of the header; N bytes of JSON
`{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {...}}`; the data, without gaps.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from experts.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20  # the index of a model of 1T parameters is near 20 MB
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_DIMENSIONS = 8
DOWNLOAD_AGAIN = "download the file again"

ITEMSIZE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a file; `begin` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError: missing, too large, not an object."""
    try:
        size = _regular_file_size(path)
        if size > MAX_JSON_BYTES:
            raise CheckpointError(path, f"at most {MAX_JSON_BYTES} bytes", f"{size} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    return _json_object(data, path)


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Every tensor of a safetensors file; the data is not read. Raises CheckpointError."""
    try:
        size = _regular_file_size(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            limit = min(size - 8, MAX_HEADER_BYTES)
            if size < 8 or length > limit:
                raise CheckpointError(
                    path,
                    f"a header of at most {max(limit, 0)} bytes",
                    f"a header length of {length} in a file of {size} bytes",
                    hint=f"not a safetensors file, or damaged: {DOWNLOAD_AGAIN}",
                )
            header = _json_object(file.read(length), path)
    except OSError as error:
        raise _unreadable(path, error) from None
    header.pop("__metadata__", None)
    base = 8 + length
    entries = {name: _entry(path, name, value, base) for name, value in header.items()}
    _check_coverage(path, entries, base, size)
    return entries


def _regular_file_size(path: Path) -> int:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise CheckpointError(path, "a regular file", "something else")
    return status.st_size


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    hint = "is this the folder of a model, downloaded completely?"
    return CheckpointError(path, "a readable file", error.strerror or error, hint=hint)


def _json_object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, "valid JSON", error, hint=DOWNLOAD_AGAIN) from None
    if not isinstance(value, dict):
        raise CheckpointError(path, "a JSON object", type(value).__name__, hint=DOWNLOAD_AGAIN)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} twice")
    return unique


def _entry(path: Path, name: str, value: Any, base: int) -> HeaderEntry:
    """Check one header entry by itself; `base` is where the data starts in the file."""
    if not isinstance(value, dict):
        raise CheckpointError(path, "an object in the header", repr(value), name)
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEMSIZE_BYTES:
        supported = ", ".join(ITEMSIZE_BYTES)
        raise CheckpointError(path, f"a dtype of {supported}", repr(dtype), name)
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(path, "a shape of whole numbers", repr(shape), name)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(path, "data_offsets [begin, end]", repr(offsets), name)
    needed, given = math.prod(shape) * ITEMSIZE_BYTES[dtype], offsets[1] - offsets[0]
    if needed != given:
        expected = f"{needed} bytes for shape {shape} of {dtype}"
        raise CheckpointError(path, expected, f"data_offsets of {given} bytes", name)
    return HeaderEntry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    """A list of whole numbers (JSON's true is an int to Python)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(path: Path, entries: dict[str, HeaderEntry], base: int, size: int) -> None:
    """The tensors follow one another without gap or overlap from `base` to the end of the file."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    for name, entry in ordered:
        if entry.end > size:
            found, hint = f"a file of {size}", f"truncated: {DOWNLOAD_AGAIN}"
            raise CheckpointError(path, f"data up to byte {entry.end}", found, name, hint)
    position = base
    for name, entry in ordered:
        if entry.begin != position:
            kind = "overlap" if entry.begin < position else "gap"
            found = f"{kind}: data from byte {entry.begin}"
            raise CheckpointError(path, f"data from byte {position}", found, name)
        position = entry.end
    if position != size:
        found = f"{size} bytes"
        raise CheckpointError(path, f"a file of {position} bytes", found, hint=DOWNLOAD_AGAIN)
