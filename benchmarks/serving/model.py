"""How large a checkpoint is and how much of it one token needs. Standard library only."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
ROUTED_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")


@dataclass(frozen=True)
class ModelSize:
    """Bytes as the files have them."""

    file_bytes: int
    active_bytes: int
    """Weights that a single decoded token reads: everything but the experts it is not routed to and
    the embeddings of other tokens."""
    num_parameters: int


def model_size(folder: Path) -> ModelSize:
    """Read from the headers of the safetensors files and config.json."""
    config = json.loads((folder / "config.json").read_text())
    active_share = config["num_experts_per_tok"] / config["n_routed_experts"]
    file_bytes, active_bytes, num_parameters = 0, 0.0, 0
    for file in sorted(folder.glob("*.safetensors")):
        file_bytes += file.stat().st_size
        for name, info in _header(file).items():
            num_values = math.prod(info["shape"])
            num_bytes = num_values * DTYPE_BYTES[info["dtype"]]
            num_parameters += num_values
            if ROUTED_EXPERT.search(name):
                active_bytes += num_bytes * active_share
            elif name == "model.embed_tokens.weight":
                active_bytes += num_bytes / info["shape"][0]
            else:
                active_bytes += num_bytes
    return ModelSize(file_bytes, round(active_bytes), num_parameters)


def _header(file: Path) -> dict[str, dict[str, object]]:
    """Name -> {dtype, shape, data_offsets} of every tensor."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header
