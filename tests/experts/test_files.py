"""Damaged and hostile checkpoint folders: each is told in one line, at once, by our own error."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.checkpoint import Checkpoint, CheckpointError
from tests.experts.checkpoint_files import (
    INDEX,
    UP,
    edit_header,
    edit_index,
    edit_tensors,
    file_with,
)

FIRST = "model-00001-of-000003.safetensors"
LAST = "model-00003-of-000003.safetensors"


@pytest.fixture
def copy(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the fp8 checkpoint that a test may damage."""
    return shutil.copytree(checkpoint_dir("v3fp8"), tmp_path / "model")


def truncate(folder: Path) -> None:
    data = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(data[:-1000])


def append(folder: Path) -> None:
    with (folder / LAST).open("ab") as file:
        file.write(b"more")


def header_length_of_10_gb(folder: Path) -> None:
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes((10**10).to_bytes(8, "little") + data[8:])


def empty_file(folder: Path) -> None:
    (folder / FIRST).write_bytes(b"")


def flip_header(folder: Path) -> None:
    data = bytearray((folder / FIRST).read_bytes())
    data[8] ^= 0xFF
    (folder / FIRST).write_bytes(data)


def change(name: str, key: str, value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_header(file_with(folder, name), lambda header: header[name].update({key: value}))

    return damage


def move(name: str, by: int) -> Callable[[Path], None]:
    """Shift where a tensor claims to lie."""

    def damage(folder: Path) -> None:
        def edit(header: dict[str, Any]) -> None:
            header[name]["data_offsets"] = [at + by for at in header[name]["data_offsets"]]

        edit_header(file_with(folder, name), edit)

    return damage


def replace_entry(folder: Path) -> None:
    edit_header(file_with(folder, UP), lambda header: header.update({UP: "here"}))


def drop_tensor(folder: Path) -> None:
    edit_tensors(file_with(folder, UP), lambda tensors: tensors.pop(UP))


def link_outside(folder: Path) -> None:
    (folder / LAST).rename(folder.parent / "elsewhere")
    (folder / LAST).symlink_to(folder.parent / "elsewhere")


def link_to_itself(folder: Path) -> None:
    (folder / LAST).unlink()
    (folder / LAST).symlink_to(folder / LAST)


def directory_as_shard(folder: Path) -> None:
    (folder / LAST).unlink()
    (folder / LAST).mkdir()


def point_at(file: Any) -> Callable[[Path], None]:
    return lambda folder: edit_index(folder, lambda weight_map: weight_map.update({UP: file}))


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def index_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


def rename_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated file": (truncate, LAST, "expected data up to byte"),
    "bytes appended": (append, LAST, "a file of"),
    "header length": (header_length_of_10_gb, FIRST, "found a header length of 10000000000"),
    "empty file": (empty_file, FIRST, "in a file of 0 bytes"),
    "flipped header": (flip_header, FIRST, "expected valid JSON"),
    "missing shard": (lambda folder: (folder / LAST).unlink(), LAST, "found No such file"),
    "missing tensor": (drop_tensor, UP, "as the index says, found none of that name"),
    "wrong shape": (change(UP, "shape", [128, 255]), UP, "expected 32640 bytes for shape"),
    "negative shape": (change(UP, "shape", [-128, -256]), UP, "a shape of whole numbers"),
    "shape not a list": (change(UP, "shape", "big"), UP, "a shape of whole numbers"),
    "shape of true": (change(UP, "shape", [True, 32768]), UP, "a shape of whole numbers"),
    "enormous shape": (change(UP, "shape", [10**30, 2]), UP, "bytes for shape"),
    "wrong dtype": (change(UP, "dtype", "F32"), UP, "expected 131072 bytes for shape"),
    "unknown dtype": (change(UP, "dtype", "F4"), UP, "BF16, I16, U16"),
    "dtype not text": (change(UP, "dtype", {}), UP, "expected a dtype of F64"),
    "offset past the end": (move(UP, 10**9), UP, "expected data up to byte"),
    "overlap": (move(UP, -128), "experts", "overlap"),
    "gap": (move(UP, 128), "experts", "expected data from byte"),
    "offsets reversed": (change(UP, "data_offsets", [9, 3]), UP, "data_offsets [begin, end]"),
    "one offset": (change(UP, "data_offsets", [9]), UP, "data_offsets [begin, end]"),
    "entry not an object": (replace_entry, UP, "an object in the header"),
    "absent tensor in index": (
        lambda folder: edit_index(folder, lambda m: m.update({"ghost": FIRST})),
        "ghost",
        "as the index says, found none of that name",
    ),
    "shard in a parent": (point_at("../model.safetensors"), UP, "a file name of this folder"),
    "absolute shard": (point_at("/etc/passwd"), UP, "a file name of this folder"),
    "shard with NUL": (point_at("a\0b"), UP, "a file name of this folder"),
    "shard of no text": (point_at(3), UP, "a file name of this folder"),
    "shard is the folder": (point_at(".."), "..", "a file inside the folder"),
    "shard name too long": (point_at("a" * 5000), "aaa", "File name too long"),
    "link out of the folder": (link_outside, LAST, "a file inside the folder"),
    "link to itself": (link_to_itself, LAST, "found"),
    "directory": (directory_as_shard, LAST, "a regular file"),
    "index without map": (index_text("{}"), INDEX, "a weight_map"),
    "index cut": (index_text('{"weight_map": {'), INDEX, "valid JSON"),
    "pickles only": (only_pickles, "pytorch_model.bin", "convert it to safetensors"),
    "no weights": (no_weights, "model", "found no weights"),
    "unsupported family": (rename_family, "config.json", "or 'kimi_k2', found 'mixtral'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json", "No such file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_told_in_one_line_at_once(case: str, copy: Path) -> None:
    damage, place, message = DAMAGE[case]
    damage(copy)
    started_s = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(copy)
    took_s, line = time.thread_time() - started_s, str(caught.value)
    assert place in line and message in line
    assert line.isprintable() and len(line) < 1500
    assert took_s < 1.0


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="nowhere: expected the folder of a model, found none"
    ):
        Checkpoint.open(tmp_path / "nowhere")


def test_any_flipped_bit_of_a_header_opens_or_raises_our_error(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint_dir("v2-lite"), tmp_path / "model")
    original = (folder / FIRST).read_bytes()
    header_bytes = 8 + int.from_bytes(original[:8], "little")
    rng, refused = np.random.default_rng(5), 0
    for _ in range(150):
        data = bytearray(original)
        data[rng.integers(header_bytes)] ^= 1 << int(rng.integers(8))
        (folder / FIRST).write_bytes(data)
        try:
            Checkpoint.open(folder)
        except CheckpointError:
            refused += 1
    assert refused > 100  # the rest hit the padding, or a name that the index does not use
