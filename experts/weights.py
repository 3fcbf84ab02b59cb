"""Where a checkpoint keeps the routed experts of its main layers."""

import torch

from experts.checkpoint import Checkpoint
from experts.config import ModelConfig
from experts.layer import ExpertWeights

_PAGE_BYTES = 4096


def _prefix(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}"


def expert_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> (out, in) of every matrix that the expert workers read, for `Checkpoint.require`."""
    wide, narrow = config.hidden_size, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            prefix = _prefix(layer, expert)
            shapes[f"{prefix}.gate_proj.weight"] = (narrow, wide)
            shapes[f"{prefix}.up_proj.weight"] = (narrow, wide)
            shapes[f"{prefix}.down_proj.weight"] = (wide, narrow)
    return shapes


def load_expert(checkpoint: Checkpoint, layer: int, expert: int) -> ExpertWeights:
    """Views of the mapped file, in the file's dtype, with every page read once.

    Without the reading the first token that needs the expert would wait for the disk.
    Raises CheckpointError (a missing tensor, scales that are not finite and positive).
    """
    prefix = _prefix(layer, expert)
    weights = ExpertWeights(
        gate=checkpoint.weight(f"{prefix}.gate_proj.weight"),
        up=checkpoint.weight(f"{prefix}.up_proj.weight"),
        down=checkpoint.weight(f"{prefix}.down_proj.weight"),
    )
    for weight in (weights.gate, weights.up, weights.down):
        weight.data.view(-1).view(torch.uint8)[::_PAGE_BYTES].max()
    return weights
