"""Shapes of a model's matrices by part, and what they take in a checkpoint. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from experts.config import ModelConfig

WeightType = Literal["fp8", "bf16", "float32"]
Shape = tuple[int, int]  # (out, in)

BF16_BYTES, FLOAT32_BYTES = 2, 4
BYTES_PER_WEIGHT: Mapping[WeightType, int] = {
    "fp8": 1,
    "bf16": BF16_BYTES,
    "float32": FLOAT32_BYTES,
}
SCALE_BLOCK = 128
"""An fp8 matrix has a float32 scale for each block of 128 x 128; edge blocks have one, too."""


def mlp(config: ModelConfig, width: int) -> list[Shape]:
    """gate, up and down of an FFN, an expert or the shared experts."""
    hidden = config.hidden_size
    return [(width, hidden), (width, hidden), (hidden, width)]


def attention(config: ModelConfig) -> list[Shape]:
    """One MLA layer: query (compressed or not), kv_a, kv_b, output."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    return [
        *([(query, hidden)] if rank is None else [(rank, hidden), (query, rank)]),
        (config.latent_width, hidden),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        (hidden, heads * config.v_head_dim),
    ]


def attention_side(config: ModelConfig) -> list[Shape]:
    """Attention, dense FFNs and shared experts of all main layers."""
    num_moe = len(config.moe_layers)
    shared = mlp(config, config.n_shared_experts * config.moe_intermediate_size)
    return (
        config.num_hidden_layers * attention(config)
        + num_moe * shared
        + (config.num_hidden_layers - num_moe) * mlp(config, config.intermediate_size)
    )


def num_params(shapes: Sequence[Shape]) -> int:
    return sum(out * width for out, width in shapes)


def stored_bytes(shapes: Sequence[Shape], weights: WeightType) -> int:
    """With the scales, if there are any."""
    scales = sum(-(-out // SCALE_BLOCK) * -(-width // SCALE_BLOCK) for out, width in shapes)
    scale_bytes = scales * FLOAT32_BYTES if weights == "fp8" else 0
    return num_params(shapes) * BYTES_PER_WEIGHT[weights] + scale_bytes
