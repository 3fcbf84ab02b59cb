"""Names and shapes of the tensors of this tier in a checkpoint; no torch, as the start checks them.

All but the gates and the routed experts.
"""

from __future__ import annotations

from experts.config import ModelConfig


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
    width, mlp = mlp_place(config, layer)
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


def mlp_place(config: ModelConfig, layer: int) -> tuple[int, str]:
    """Width and name of the FFN that this tier computes in a layer."""
    if config.is_moe_layer(layer):
        width = config.n_shared_experts * config.moe_intermediate_size
        return width, "mlp.shared_experts"
    return config.intermediate_size, "mlp"
