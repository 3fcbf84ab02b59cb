"""Sizes of the models that the kernels are checked and timed for. No pydantic, unlike
cluster.deploy.known_models, which has the same numbers (a test compares them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelShape:
    """Fields are named as in config.json."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    vocab_size: int
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    @property
    def latent_width(self) -> int:
        """c + r"""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def query_width(self) -> int:
        """n + r"""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace


V2_LITE = ModelShape("V2-Lite", 2048, 27, 1, 16, 10944, 1408, 64, 6, 2, 102400)
V2 = ModelShape(
    "V2", 5120, 60, 1, 128, 12288, 1536, 160, 6, 2, 102400, q_lora_rank=1536,
    n_group=8, topk_group=3, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
)  # fmt: skip
V3 = ModelShape(
    "V3", 7168, 61, 3, 128, 18432, 2048, 256, 8, 1, 129280, q_lora_rank=1536,
    n_group=8, topk_group=4, scoring_func="sigmoid", topk_method="noaux_tc",
    norm_topk_prob=True, routed_scaling_factor=2.5,
)  # fmt: skip
ODD = ModelShape(
    "odd", 328, 3, 1, 5, 200, 136, 24, 3, 1, 97, q_lora_rank=40, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_group=4, topk_group=2,
    scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True,
)  # fmt: skip
"""Widths that no block divides."""
TINY = ModelShape(
    "tiny", 64, 2, 1, 2, 96, 32, 8, 2, 1, 64, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16,
)  # fmt: skip
"""For the interpreter."""

MODELS = (V2_LITE, V2, V3)
