"""The architecture and the recipe of the default model: every number that training depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experts.config import ModelConfig

BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 2048,
    "rope_theta": 10000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "ep_size": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
"""`config.json` as it ships. V3's ratios: half of the groups, two experts in each chosen one."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What training does, in steps and tokens; the defaults made the file that ships."""

    seed: int = 20261122
    steps: int = 3200
    rows: int = 16
    """Sequences a step."""
    length: int = 256
    """Tokens a sequence; dialogues are packed and do not see each other."""
    matrix_lr: float = 0.02
    """Muon, the matrices of the layers."""
    vector_lr: float = 3e-3
    """AdamW, norms, gates and the head; the embedding learns `embedding_lr_factor` times faster."""
    embedding_lr_factor: float = 5.0
    warmup_steps: int = 60
    decay_share: float = 0.25
    """The last part of the steps, in which the learning rate falls linearly to nothing."""
    max_score: float = 30.0
    """Attention scores above this shrink their head's query and key weights."""
    weight_decay: float = 0.01
    turn_gates_at: float = 0.5
    """Share of the steps after which the gates are turned toward the domains, once."""
    turn_strength: float = 0.7
    """Logits that a domain's own experts gain per standard deviation of its direction."""
    mtp_from: float = 0.5
    """Share of the steps after which the next-token module trains too."""
    mtp_weight: float = 0.3
    bias_speed: float = 0.01
    """gamma of b += gamma * sign(mean - load); a third of it lost the balance after 450 steps."""
    settle_passes: int = 100
    """Passes after the last step in which only the biases move, ever more slowly."""


def model_config() -> ModelConfig:
    """The architecture as Shoal's own reader sees it."""
    return ModelConfig.model_validate(CONFIG | {"eos_token_ids": (EOS_ID,)}, strict=False)
