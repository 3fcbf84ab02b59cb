"""Edit the files of a checkpoint folder: headers, tensors and the index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
UP_SCALE = UP + "_scale_inv"


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file and leave the data behind it."""
    header, data = header_of(path), path.read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little") :]
    edit(header)
    path.write_bytes(raw_file(header, data))


def raw_file(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    path.unlink()
    save_file(tensors, path)


def file_with(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
