"""`config.json` of every small model that `shoal model make-tiny` writes and the tests run.

Each preset keeps what makes its family different (gate, groups, scales, rope, fp8 layout) at a size
that a laptop checks in seconds; `small` and `lite` are for measuring.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
_COMMON: Config = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_position_embeddings": 2560,
    "vocab_size": 512,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "torch_dtype": "bfloat16",
}
_V2_FAMILY = _COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "first_k_dense_replace": 1,
}
_V3_FAMILY = _COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}
_V2_SMALL = _V2_FAMILY | {
    "hidden_size": 128,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
}
# DeepSeek-V2-Lite: no query compression, one group, the best k of a softmax, scale 1
_V2LITE = _V2_SMALL | {
    "num_hidden_layers": 4,
    "q_lora_rank": None,
    "n_routed_experts": 16,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
# DeepSeek-V2: device-limited routing (best expert of a group, 3 of 8 groups), scale 16
_V2 = _V2_SMALL | {
    "num_hidden_layers": 3,
    "q_lora_rank": 96,
    "n_routed_experts": 32,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
    "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
# DeepSeek-V3 and R1 in bfloat16, with one next-token module
_V3 = _V3_FAMILY | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
# Moonlight and Kimi-K2: one group, no query compression here, plain rope, nope and v differ
_KIMI = _V3 | {
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "rope_scaling": None,
    "rope_theta": 50000,
    "v_head_dim": 48,
    "routed_scaling_factor": 2.446,
    "num_nextn_predict_layers": 0,
    "n_shared_experts": 2,
    "rms_norm_eps": 1e-5,
}
_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_FP8_UE8M0 = _FP8 | {"scale_fmt": "ue8m0"}
# As in the real V3 (kv_a_proj_with_mqa has 576 rows) the last block of a matrix is partial
_V3_RAGGED = _V3 | {
    "hidden_size": 192,
    "moe_intermediate_size": 192,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 160,
    "quantization_config": _FP8,
}
_REAL_YARN = _YARN | {"original_max_position_embeddings": 4096}
# 38.6M parameters in V3's form: large enough to time, small enough for a laptop
_SMALL = _V3 | {
    "vocab_size": 8192,
    "max_position_embeddings": 163840,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "num_nextn_predict_layers": 0,
    "rope_scaling": _REAL_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
# V2-Lite with 4 of its 27 layers and a third of its vocabulary; a layer at its real size
_LITE = _V2LITE | {
    "vocab_size": 32768,
    "max_position_embeddings": 163840,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "rope_scaling": _REAL_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}

PRESETS: dict[str, Config] = {
    "v2-lite": _V2LITE,
    "v2": _V2,
    "v3": _V3,
    "kimi-k2": _KIMI,
    "v3fp8": _V3 | {"quantization_config": _FP8},
    "v3fp8-ue8m0": _V3 | {"quantization_config": _FP8_UE8M0},
    "v3fp8-ragged": _V3_RAGGED,
    "small": _SMALL,
    "lite": _LITE,
}
