"""Checkpoint: tensors as views of mapped files, block scales, and what a model requires."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.tiny_checkpoint import PRESETS
from cluster.tiny_weights import tensor_shapes
from experts.checkpoint import TORCH_DTYPES, Checkpoint, CheckpointError
from experts.files import ITEMSIZE_BYTES
from experts.tensor_files import DTYPES, decode_exponents
from tests.experts.checkpoint_files import (
    INDEX,
    UP,
    UP_SCALE,
    edit_index,
    edit_tensors,
    file_with,
    raw_file,
)
from tests.reference import read_weights


@pytest.fixture
def copy(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the fp8 checkpoint that a test may damage."""
    return shutil.copytree(checkpoint_dir("v3fp8"), tmp_path / "model")


# --- reading


@pytest.mark.parametrize("preset", ["v2-lite", "v3fp8", "v3fp8-ue8m0", "v3fp8-ragged"])
def test_values_are_those_that_safetensors_reads(
    preset: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir(preset))
    values = read_weights(checkpoint_dir(preset))
    assert {n for n in checkpoint.names() if not n.endswith("_scale_inv")} == set(values)
    for name, expected in values.items():
        is_matrix = expected.ndim == 2
        got = checkpoint.weight(name).dequantize() if is_matrix else checkpoint.tensor(name)
        assert torch.equal(got.float(), expected.float())


def test_info_and_sizes(checkpoint_dir: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("v3fp8"))
    info = checkpoint.info(UP)
    assert (info.dtype, info.shape, info.num_bytes) == ("float8_e4m3fn", (128, 256), 32_768)
    assert checkpoint.weight(UP).scale_inv.shape == (1, 2)
    assert checkpoint.total_bytes == 9_112_880
    assert checkpoint.config.n_routed_experts == 16


def test_dtypes_have_the_sizes_that_the_headers_are_checked_with() -> None:
    sizes = {name: TORCH_DTYPES[dtype].itemsize for name, dtype in DTYPES.items()}
    assert sizes == ITEMSIZE_BYTES


def test_a_tensor_is_a_view_and_writing_to_it_leaves_the_file_alone(copy: Path) -> None:
    checkpoint, name = Checkpoint.open(copy), "model.norm.weight"
    before = file_with(copy, name).read_bytes()
    view = checkpoint.tensor(name)
    view.zero_()
    assert checkpoint.tensor(name).data_ptr() == view.data_ptr()
    assert not checkpoint.tensor(name).any()
    assert file_with(copy, name).read_bytes() == before
    assert Checkpoint.open(copy).tensor(name).any()


def resident_bytes(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory, from the kernel's own count."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(f" {path}")
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
def test_only_the_experts_that_are_read_become_resident(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("small"))
    projections = ("gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.3.mlp.experts.{e}.{p}.weight" for e in (5, 20) for p in projections]
    file = checkpoint.info(names[0]).file
    weights = [checkpoint.weight(name) for name in names]
    assert {checkpoint.info(name).file for name in names} == {file}
    assert resident_bytes(file) == 0  # nothing was read by opening and making views
    for weight in weights:
        weight.dequantize()
    touched = 6 * 512 * 64 * 2
    around = 6 * 2 * 65_536  # the kernel maps up to 64 KiB on each side of a fault
    assert touched <= resident_bytes(file) <= touched + around < file.stat().st_size / 20


def test_unaligned_tensors_are_read_too(copy: Path) -> None:
    for path in copy.glob("model*"):
        path.unlink()
    values = torch.arange(3, dtype=torch.float32)
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
    }
    (copy / "model.safetensors").write_bytes(raw_file(header, b"\x07" + values.numpy().tobytes()))
    checkpoint = Checkpoint.open(copy)
    assert torch.equal(checkpoint.tensor("b"), values)
    assert checkpoint.tensor("a").tolist() == [7]


def test_what_transformers_saves_is_read(
    hf_model: Callable[[str], Any], checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """One file without an index, float32, and the new spelling of config.json."""
    hf_model("v2-lite").save_pretrained(tmp_path)
    saved, original = Checkpoint.open(tmp_path), Checkpoint.open(checkpoint_dir("v2-lite"))
    assert saved.config.rope_scaling == original.config.rope_scaling
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / INDEX).exists()
    for name in original.names():
        assert torch.equal(saved.tensor(name), original.tensor(name).float())


def test_links_of_the_hugging_face_cache_are_followed(copy: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(copy.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert Checkpoint.open(snapshot).weight(UP).shape == (128, 256)


# --- scales


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_may_be_stored_as_exponents(
    dtype: torch.dtype, checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint_dir("v3fp8-ue8m0"), tmp_path / "model")
    expected = Checkpoint.open(folder).weight(UP).scale_inv

    def store_exponents(tensors: dict[str, torch.Tensor]) -> None:
        exponents = (tensors[UP_SCALE].log2() + 127).to(torch.uint8)
        tensors[UP_SCALE] = exponents.view(dtype)

    edit_tensors(file_with(folder, UP_SCALE), store_exponents)
    assert Checkpoint.open(folder).weight(UP).scale_inv.tolist() == expected.tolist()


def test_every_exponent_is_exact() -> None:
    decoded = decode_exponents(np.arange(256, dtype=np.uint8)).tolist()
    assert decoded[:255] == [math.ldexp(1.0, b - 127) for b in range(255)]
    assert math.isnan(decoded[255])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_bad_scale_names_tensor_and_block(bad: float, copy: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP_SCALE][0, 1] = bad

    edit_tensors(file_with(copy, UP_SCALE), spoil)
    checkpoint = Checkpoint.open(copy)
    for read in (lambda: checkpoint.weight(UP), checkpoint.check_scales):
        with pytest.raises(CheckpointError, match=r"finite positive.* at block \(0, 1\)") as caught:
            read()
        assert caught.value.tensor == UP_SCALE


def test_ragged_blocks_need_a_scale_each(copy: Path) -> None:
    """128 x 256 has 1 x 2 blocks."""

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP_SCALE] = torch.ones(1, 3)

    edit_tensors(file_with(copy, UP_SCALE), widen)
    checkpoint = Checkpoint.open(copy)
    for read in (lambda: checkpoint.require({UP: (128, 256)}), checkpoint.check_scales):
        with pytest.raises(CheckpointError, match=r"shape \(1, 2\) of .*, found \(1, 3\)"):
            read()


# --- require


def test_require_accepts_the_whole_model(checkpoint_dir: Callable[[str], Path]) -> None:
    for preset in ("v2-lite", "v3", "v3fp8-ragged"):
        checkpoint = Checkpoint.open(checkpoint_dir(preset))
        checkpoint.require(tensor_shapes(PRESETS[preset]))
        checkpoint.check_scales()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (UP, (256, 128), r"expected shape \(256, 128\), found \(128, 256\)"),
        ("model.layers.1.mlp.experts.16.up_proj.weight", (128, 256), "found none of that name"),
        (UP_SCALE, (9, 9), r"expected shape \(9, 9\)"),
    ],
)
def test_require_reports_the_first_problem(
    name: str, shape: tuple[int, ...], message: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("v3fp8"))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.require({"model.norm.weight": (256,), name: shape, "later": (1,)})
    assert caught.value.tensor == name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, torch.float8_e5m2])
def test_dtypes_that_are_not_computed_with_are_refused(dtype: torch.dtype, copy: Path) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = tensors[UP].float().to(dtype)

    edit_tensors(file_with(copy, UP), convert)
    name = str(dtype).removeprefix("torch.")
    supported = "expected float32, bfloat16, float8_e4m3fn"
    with pytest.raises(CheckpointError, match=f"{supported}, found {name}"):
        Checkpoint.open(copy).require({UP: (128, 256)})


def test_fp8_without_scales_or_without_its_config_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a quantization_config, found none"):
        Checkpoint.open(copy).weight(UP)
    (copy / "config.json").write_text(json.dumps(PRESETS["v3fp8"]))
    edit_index(copy, lambda weight_map: weight_map.pop(UP_SCALE))
    with pytest.raises(CheckpointError, match="up_proj.weight_scale_inv: .* none of that name"):
        Checkpoint.open(copy).weight(UP)
