"""Checkpoint names to the weights this tier holds: all but the gates and the routed experts.

Matrices stay views of the mapped files in their dtype. Norm weights become float32 (they are tiny).
An fp8 kv_b is dequantised once, as the absorbed form multiplies its transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.heads import HeadWeights
from experts.checkpoint import Checkpoint
from experts.config import ModelConfig
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


def attention_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that `load_weights` reads, with its shape; for `Checkpoint.require`."""
    d, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d)}
    for layer in range(config.num_hidden_layers):
        shapes |= _layer_shapes(config, layer)
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (vocab, d)}


def _layer_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    d, heads, c = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    n, r, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    attention: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa": (c + r, d),
        "kv_a_layernorm": (c,),
        "kv_b_proj": (heads * (n + v), c),
        "o_proj": (d, heads * v),
    }
    if config.q_lora_rank is None:
        attention["q_proj"] = (heads * (n + r), d)
    else:
        q = config.q_lora_rank
        attention |= {
            "q_a_proj": (q, d),
            "q_a_layernorm": (q,),
            "q_b_proj": (heads * (n + r), q),
        }
    width, mlp = _mlp_place(config, layer)
    return {
        f"model.layers.{layer}.{name}.weight": shape
        for name, shape in {
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            **{f"self_attn.{name}": shape for name, shape in attention.items()},
            f"{mlp}.gate_proj": (width, d),
            f"{mlp}.up_proj": (width, d),
            f"{mlp}.down_proj": (d, width),
        }.items()
    }


def _mlp_place(config: ModelConfig, layer: int) -> tuple[int, str]:
    """Width and name of the FFN that this tier computes in a layer."""
    if config.is_moe_layer(layer):
        width = config.n_shared_experts * config.moe_intermediate_size
        return width, "mlp.shared_experts"
    return config.intermediate_size, "mlp"


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
    _, mlp_name = _mlp_place(checkpoint.config, layer)
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
