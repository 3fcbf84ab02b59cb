"""The routed experts of a checkpoint's main layers."""

import torch

from experts.checkpoint import Checkpoint
from experts.layer import ExpertWeights
from experts.tensor_shapes import expert_prefix

_PAGE_BYTES = 4096


def load_expert(checkpoint: Checkpoint, layer: int, expert: int) -> ExpertWeights:
    """Views of the mapped file, in the file's dtype, with every page read once.

    Without the reading the first token that needs the expert would wait for the disk.
    Raises CheckpointError (a missing tensor, scales that are not finite and positive).
    """
    prefix = expert_prefix(layer, expert)
    weights = ExpertWeights(
        gate=checkpoint.weight(f"{prefix}.gate_proj.weight"),
        up=checkpoint.weight(f"{prefix}.up_proj.weight"),
        down=checkpoint.weight(f"{prefix}.down_proj.weight"),
    )
    for weight in (weights.gate, weights.up, weights.down):
        weight.data.view(-1).view(torch.uint8)[::_PAGE_BYTES].max()
    return weights
