"""Models that can be named without having their files: the part of config.json that sets sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.config import ConfigError, default_model
from cluster.deploy.matrices import WeightType
from cluster.deploy.sizes import ModelSizes
from cluster.field_names import nearest

_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_V2_FAMILY = _MLA | {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
}
_V2_LITE = _V2_FAMILY | {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "topk_method": "greedy",
}
_V2 = _V2_FAMILY | {
    "hidden_size": 5120,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
}
_V3 = _MLA | {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
_KIMI_K2 = _V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 131072,
}
KNOWN: dict[str, dict[str, Any]] = {
    "v2-lite": _V2_LITE,
    "v2": _V2,
    "v3": _V3,
    "kimi-k2": _KIMI_K2,
}
EMBEDDED = "embedded"
ALIASES = {
    "deepseek-v2-lite": "v2-lite",
    "deepseek-v2": "v2",
    "v2.5": "v2",
    "deepseek-v2.5": "v2",
    "deepseek-v3": "v3",
    "v3.1": "v3",
    "deepseek-v3.1": "v3",
    "r1": "v3",
    "deepseek-r1": "v3",
    "kimi": "kimi-k2",
    "shoal-tiny": EMBEDDED,
}
NAMES = (*KNOWN, EMBEDDED)


def known_model(name: str, weights: WeightType | None = None) -> ModelSizes:
    """By a name of `NAMES` or an alias. Raises ConfigError that names the nearest ones."""
    lowered = name.lower()
    chosen = ALIASES.get(lowered, lowered)
    if chosen == EMBEDDED:
        return ModelSizes.load(default_model(), weights)
    if chosen not in KNOWN:
        raise ConfigError(f"model = {name!r}: {suggestion(name, (*NAMES, *ALIASES), NAMES)}")
    return ModelSizes.of(KNOWN[chosen], chosen, weights)


def model_sizes(model: str, weights: WeightType | None = None) -> ModelSizes:
    """By name, or of a folder with config.json. Raises ConfigError or CheckpointError."""
    if Path(model).is_dir():
        return ModelSizes.load(Path(model), weights)
    if "/" in model or model.startswith("."):
        raise ConfigError(f"model = {model!r}: no such folder")
    return known_model(model, weights)


def suggestion(given: str, accepted: tuple[str, ...], shown: tuple[str, ...] | None = None) -> str:
    """What to say of a name that is not known: the nearest one, then those that are."""
    meant = nearest(given.lower(), accepted)
    hint = f"not known, did you mean {meant}? " if meant else "not known; "
    return f"{hint}known are {', '.join(shown or accepted)}"
