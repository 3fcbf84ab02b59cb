"""Where a checkpoint keeps the routed experts of its main layers; no torch, as the start checks
them."""

from experts.config import ModelConfig


def expert_prefix(layer: int, expert: int) -> str:
    """How the names of its three matrices begin."""
    return f"model.layers.{layer}.mlp.experts.{expert}"


def expert_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> (out, in) of every matrix that the expert workers read, for `Checkpoint.require`."""
    wide, narrow = config.hidden_size, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            prefix = expert_prefix(layer, expert)
            shapes[f"{prefix}.gate_proj.weight"] = (narrow, wide)
            shapes[f"{prefix}.up_proj.weight"] = (narrow, wide)
            shapes[f"{prefix}.down_proj.weight"] = (wide, narrow)
    return shapes
