"""Write seeded checkpoints of random weights in the layout that DeepSeek publishes.

Memory stays at one tensor (as float32 and in its file type) however large the model is: the files
are laid out first and filled in place.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cluster.tiny_presets import PRESETS, Config
from cluster.tiny_tokenizer import generation_config, tokenizer_config, tokenizer_json
from cluster.tiny_weights import BLOCK, Shape, is_quantised, quantise_blocks, tensor_shapes, values

__all__ = ["PRESETS", "write_checkpoint"]

DEFAULT_SEED = 20261122
SCALE_SUFFIX = "_scale_inv"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Spec:
    """A tensor to write; `dtype` as safetensors names it."""

    name: str
    shape: Shape
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_checkpoint(
    folder: Path,
    preset: str,
    seed: int = DEFAULT_SEED,
    shards: int = 3,
    progress: Progress | None = None,
) -> int:
    """Write `folder` whole or not at all; returns the bytes of all tensors.

    `progress(done_bytes, total_bytes)` is called after each tensor. Raises ValueError for an
    unknown preset, FileExistsError when `folder` has something in it, OSError for a full disk.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir()
        num_bytes = _write_weights(partial, PRESETS[preset], seed, shards, progress)
        _write_texts(partial, PRESETS[preset])
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def _specs(config: Config) -> list[_Spec]:
    """Every tensor of the files: the weights, then the scales of those that are fp8."""
    quantised = "quantization_config" in config
    weights, scales = [], []
    for name, shape in tensor_shapes(config).items():
        dtype = "F32" if name.endswith("e_score_correction_bias") else "BF16"
        if quantised and is_quantised(name):
            dtype = "F8_E4M3"
            blocks = tuple(math.ceil(size / BLOCK) for size in shape)
            scales.append(_Spec(name + SCALE_SUFFIX, blocks, "F32"))
        weights.append(_Spec(name, shape, dtype))
    return weights + scales


def _write_weights(
    folder: Path,
    config: Config,
    seed: int,
    shards: int,
    progress: Progress | None,
) -> int:
    specs = _specs(config)
    total, done = sum(spec.num_bytes for spec in specs), 0
    parts = _split(specs, shards)
    power_of_two = config.get("quantization_config", {}).get("scale_fmt") == "ue8m0"
    weight_map: dict[str, str] = {}
    with ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for number, part in enumerate(parts, start=1):
            file_name = f"model-{number:05d}-of-{len(parts):06d}.safetensors"
            file = stack.enter_context((folder / file_name).open("wb"))
            places |= {name: (file, offset) for name, offset in _write_header(file, part)}
            weight_map |= {spec.name: file_name for spec in part}
        for spec in specs:
            if spec.name.endswith(SCALE_SUFFIX):
                continue  # written with its matrix
            for name, tensor in _stored(spec, values(spec.name, spec.shape, seed), power_of_two):
                done += _write_tensor(*places[name], tensor)
            if progress is not None:
                progress(done, total)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    return total


def _stored(spec: _Spec, tensor: Tensor, power_of_two: bool) -> Iterator[tuple[str, Tensor]]:
    if spec.dtype != "F8_E4M3":
        yield spec.name, tensor
        return
    codes, scales = quantise_blocks(tensor.float(), power_of_two)
    yield spec.name, codes
    yield spec.name + SCALE_SUFFIX, scales


def _split(specs: list[_Spec], shards: int) -> list[list[_Spec]]:
    """Into at most `shards` files of about equal size, in order."""
    room, used = sum(spec.num_bytes for spec in specs) / shards, 0
    parts: list[list[_Spec]] = [[]]
    for spec in specs:
        if used >= room and len(parts) < shards:
            parts.append([])
            used = 0
        parts[-1].append(spec)
        used += spec.num_bytes
    return parts


def _write_header(file: BinaryIO, specs: list[_Spec]) -> list[tuple[str, int]]:
    """Write a safetensors header; returns (name, place in the file) of each tensor.

    Order and padding are those of the safetensors library, so the file is the same bit for bit.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = [], 0
    for spec in sorted(specs, key=lambda s: (-DTYPES[s.dtype].itemsize, s.name)):
        offsets.append((spec.name, end))
        span = [end, end + spec.num_bytes]
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": span}
        end += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
    return [(name, 8 + len(text) + offset) for name, offset in offsets]


def _write_tensor(file: BinaryIO, offset: int, tensor: Tensor) -> int:
    file.seek(offset)
    return file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def _write_texts(folder: Path, config: Config) -> None:
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config())
    _write_json(folder / "tokenizer.json", tokenizer_json())
    settings = tokenizer_config(config["max_position_embeddings"])
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
