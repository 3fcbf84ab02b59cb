"""Where a checkpoint keeps the gates of its main layers."""

from __future__ import annotations

import torch

from experts.checkpoint import Checkpoint, CheckpointError
from experts.config import ModelConfig
from experts.linear import Weight
from router.gate import GateWeights


def _names(layer: int) -> tuple[str, str]:
    prefix = f"model.layers.{layer}.mlp.gate"
    return f"{prefix}.weight", f"{prefix}.e_score_correction_bias"


def gate_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a router reads, for `Checkpoint.require`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in config.moe_layers:
        weight, bias = _names(layer)
        shapes[weight] = (config.n_routed_experts, config.hidden_size)
        if config.topk_method == "noaux_tc":
            shapes[bias] = (config.n_routed_experts,)
    return shapes


def load_gates(checkpoint: Checkpoint) -> dict[int, GateWeights]:
    """Layer -> its gate, upcast to float32. Raises CheckpointError."""
    config = checkpoint.config
    checkpoint.require(gate_tensor_shapes(config))
    return {layer: _load_gate(checkpoint, layer) for layer in config.moe_layers}


def _load_gate(checkpoint: Checkpoint, layer: int) -> GateWeights:
    name, bias_name = _names(layer)
    weight = Weight(checkpoint.weight(name).dequantize())
    if checkpoint.config.topk_method != "noaux_tc":
        return GateWeights(weight)
    bias = checkpoint.tensor(bias_name).float()
    if not bool(torch.isfinite(bias).all()):
        file = checkpoint.info(bias_name).file
        raise CheckpointError(file, "finite biases", "NaN or infinity", bias_name)
    return GateWeights(weight, bias)
