"""Checkpoint names to the weights this tier holds: all but the gates and the routed experts.

Matrices stay views of the mapped files in their dtype. Norm weights become float32 (they are tiny).
An fp8 kv_b is dequantised once, as the absorbed form multiplies its transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.heads import HeadWeights
from attention.tensor_shapes import attention_tensor_shapes, mlp_place
from experts.checkpoint import Checkpoint
from experts.layer import ExpertWeights
from experts.linear import Weight


@dataclass(frozen=True, slots=True, eq=False)
class QueryWeights:
    """`down` and `norm` are None for a model without query compression."""

    down: Weight | None  # [q, d]
    norm: Tensor | None  # [q] float32
    up: Weight  # [H * (n + r), q], or of width d without compression


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWeights:
    """One layer's MLA. w_uv is a view of kv_b; w_uk is the other half, transposed and copied, as
    both products of the absorbed form read rows (V2-Lite: 57 MB of bfloat16 in all layers)."""

    query: QueryWeights
    kv_a: Weight  # [c + r, d]
    kv_a_norm: Tensor  # [c] float32
    kv_b: Weight  # [H * (n + v), c]
    w_uk: HeadWeights  # [H, c, n]
    w_uv: HeadWeights  # [H, v, c]
    output: Weight  # [d, H * v]


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """A decoder layer. `mlp` is the dense FFN, or the shared experts of a MoE layer."""

    input_norm: Tensor  # [d] float32
    attention: AttentionWeights
    post_attention_norm: Tensor  # [d] float32
    mlp: ExpertWeights
    is_moe: bool


@dataclass(frozen=True, slots=True, eq=False)
class ModelWeights:
    """embedding [V, d] in the dtype of its file; norm [d] float32; lm_head [V, d]."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Weight


def load_weights(checkpoint: Checkpoint) -> ModelWeights:
    """Views of all weights of this tier. Raises CheckpointError."""
    config = checkpoint.config
    checkpoint.require(attention_tensor_shapes(config))
    return ModelWeights(
        embedding=checkpoint.tensor("model.embed_tokens.weight"),
        layers=tuple(load_layer(checkpoint, i) for i in range(config.num_hidden_layers)),
        norm=load_norm(checkpoint, "model.norm"),
        lm_head=checkpoint.weight("lm_head.weight"),
    )


def load_norm(checkpoint: Checkpoint, name: str) -> Tensor:
    """The weight of a norm as float32."""
    return checkpoint.tensor(f"{name}.weight").float().contiguous()


def load_layer(checkpoint: Checkpoint, layer: int) -> LayerWeights:
    """One layer, when `require` has accepted the file."""
    place = f"model.layers.{layer}"
    _, mlp_name = mlp_place(checkpoint.config, layer)
    mlp = [
        checkpoint.weight(f"{place}.{mlp_name}.{part}_proj.weight")
        for part in ("gate", "up", "down")
    ]
    return LayerWeights(
        input_norm=load_norm(checkpoint, f"{place}.input_layernorm"),
        attention=_load_attention(checkpoint, f"{place}.self_attn"),
        post_attention_norm=load_norm(checkpoint, f"{place}.post_attention_layernorm"),
        mlp=ExpertWeights(*mlp),
        is_moe=checkpoint.config.is_moe_layer(layer),
    )


def _load_attention(checkpoint: Checkpoint, place: str) -> AttentionWeights:
    config = checkpoint.config
    kv_b = checkpoint.weight(f"{place}.kv_b_proj.weight")
    if kv_b.data.dtype == torch.float8_e4m3fn:
        kv_b = Weight(kv_b.dequantize())
    per_head = kv_b.data.view(config.num_attention_heads, -1, config.kv_lora_rank)
    return AttentionWeights(
        query=_load_query(checkpoint, place),
        kv_a=checkpoint.weight(f"{place}.kv_a_proj_with_mqa.weight"),
        kv_a_norm=load_norm(checkpoint, f"{place}.kv_a_layernorm"),
        kv_b=kv_b,
        w_uk=HeadWeights(per_head[:, : config.qk_nope_head_dim].transpose(1, 2).contiguous()),
        w_uv=HeadWeights(per_head[:, config.qk_nope_head_dim :]),
        output=checkpoint.weight(f"{place}.o_proj.weight"),
    )


def _load_query(checkpoint: Checkpoint, place: str) -> QueryWeights:
    if checkpoint.config.q_lora_rank is None:
        return QueryWeights(None, None, checkpoint.weight(f"{place}.q_proj.weight"))
    return QueryWeights(
        down=checkpoint.weight(f"{place}.q_a_proj.weight"),
        norm=load_norm(checkpoint, f"{place}.q_a_layernorm"),
        up=checkpoint.weight(f"{place}.q_b_proj.weight"),
    )
