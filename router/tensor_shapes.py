"""Where a checkpoint keeps the gates of its main layers; no torch, as the start checks them."""

from __future__ import annotations

from experts.config import ModelConfig


def gate_names(layer: int) -> tuple[str, str]:
    """Of the weight and the bias."""
    prefix = f"model.layers.{layer}.mlp.gate"
    return f"{prefix}.weight", f"{prefix}.e_score_correction_bias"


def gate_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a router reads, for `Checkpoint.require`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in config.moe_layers:
        weight, bias = gate_names(layer)
        shapes[weight] = (config.n_routed_experts, config.hidden_size)
        if config.topk_method == "noaux_tc":
            shapes[bias] = (config.n_routed_experts,)
    return shapes
