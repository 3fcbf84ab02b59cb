"""How large a model is and what a token costs it, from its config.json alone: pure arithmetic.

Counts are of the main layers; next-token modules are not loaded. One matrix multiplication is two
FLOP a parameter. Sizes and token costs of the released models are checked in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from cluster.deploy.matrices import (
    BF16_BYTES,
    FLOAT32_BYTES,
    WeightType,
    attention_side,
    mlp,
    num_params,
    stored_bytes,
)
from experts.config import ModelConfig
from experts.placement.replan import slots_needed
from experts.placement.space import ExpertSpace

AttentionForm = Literal["absorbed", "naive"]


@dataclass(frozen=True)
class ModelSizes:
    """Parameters, bytes and FLOP of a model whose matrices are stored as `weights`.

    Embedding, head, norms and gates are never fp8.
    """

    name: str
    config: ModelConfig
    weights: WeightType

    @classmethod
    def of(
        cls, raw: Mapping[str, Any], name: str = "model", weights: WeightType | None = None
    ) -> Self:
        """`raw`: the object of config.json. `weights` None: as it says. Raises CheckpointError."""
        config = ModelConfig.parse(raw)
        return cls(name, config, weights or _stored_as(config))

    @classmethod
    def load(cls, folder: Path, weights: WeightType | None = None) -> Self:
        """Of a checkpoint folder, of which only config.json is read. Raises CheckpointError."""
        config = ModelConfig.load(folder)
        return cls(folder.resolve().name, config, weights or _stored_as(config))

    # ---- parameters

    @cached_property
    def num_moe_layers(self) -> int:
        return len(self.config.moe_layers)

    @cached_property
    def space(self) -> ExpertSpace:
        """What has to be placed: whole groups where the model is group-limited."""
        groups = self.config.n_group if self.config.is_group_limited else 1
        return ExpertSpace(self.config.moe_layers, self.config.n_routed_experts, groups)

    @cached_property
    def num_experts_total(self) -> int:
        """(layer, expert) pairs."""
        return self.space.num_total

    @cached_property
    def expert_params(self) -> int:
        """One routed expert."""
        return num_params(mlp(self.config, self.config.moe_intermediate_size))

    @property
    def routed_params(self) -> int:
        """All routed experts of all layers."""
        return self.num_experts_total * self.expert_params

    @cached_property
    def attention_matmul_params(self) -> int:
        """Attention, dense FFNs and shared experts of all layers: computed in `weights`."""
        return num_params(attention_side(self.config))

    @property
    def gate_params(self) -> int:
        """The gates of all layers; always computed in float32 and stored in bf16."""
        return self.num_moe_layers * self.config.n_routed_experts * self.config.hidden_size

    @property
    def embedding_params(self) -> int:
        """The embedding; the head is as large again."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def norm_params(self) -> int:
        """Norms and, for a sigmoid gate, the bias of every expert."""
        config = self.config
        per_layer = 2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0)
        bias = self.num_experts_total if config.topk_method == "noaux_tc" else 0
        return config.num_hidden_layers * per_layer + config.hidden_size + bias

    @property
    def attention_side_params(self) -> int:
        """All but the routed experts, embedding and head."""
        return self.attention_matmul_params + self.gate_params

    @property
    def total_params(self) -> int:
        unrouted = self.attention_side_params + 2 * self.embedding_params + self.norm_params
        return self.routed_params + unrouted

    @property
    def routed_params_per_token(self) -> int:
        """Of the routed experts one token meets."""
        return self.num_moe_layers * self.config.num_experts_per_tok * self.expert_params

    @property
    def active_params(self) -> int:
        """In the matrices one token is multiplied by, head included, embedding not."""
        return self.routed_params_per_token + self.attention_side_params + self.embedding_params

    # ---- FLOP

    @property
    def flops_per_token(self) -> int:
        """Without core attention, which grows with the context."""
        return 2 * self.active_params

    def core_flops_per_context_token(self, form: AttentionForm = "absorbed") -> int:
        """Of one new token for every token of its context, all layers together."""
        config = self.config
        width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        if form == "absorbed":
            width = config.latent_width + config.kv_lora_rank
        return config.num_hidden_layers * 2 * config.num_attention_heads * width

    # ---- bytes

    @cached_property
    def expert_bytes(self) -> int:
        """One routed expert with its scales: what a slot of an expert worker holds."""
        return stored_bytes(mlp(self.config, self.config.moe_intermediate_size), self.weights)

    @cached_property
    def attention_matmul_bytes(self) -> int:
        """Read for every step: attention, dense FFNs and shared experts."""
        return stored_bytes(attention_side(self.config), self.weights)

    @property
    def head_bytes(self) -> int:
        return self.embedding_params * self._unquantised_bytes

    @cached_property
    def attention_side_bytes(self) -> int:
        """All but the routed experts, as stored in the checkpoint."""
        plain = 2 * self.embedding_params + self.gate_params + self.norm_params
        return self.attention_matmul_bytes + plain * self._unquantised_bytes

    @property
    def attention_copies_bytes(self) -> int:
        """What an attention worker holds beside the checkpoint's form: an fp8 kv_b once more,
        dequantised, and the half of kv_b that the absorbed form reads transposed."""
        config, heads = self.config, self.config.num_attention_heads
        rows = heads * config.qk_nope_head_dim
        if self.weights == "fp8":
            rows += heads * (config.qk_nope_head_dim + config.v_head_dim)
        return config.num_hidden_layers * rows * config.kv_lora_rank * self._unquantised_bytes

    def cache_bytes_per_token(self, itemsize: int = BF16_BYTES) -> int:
        """Of one cached token over all layers. `itemsize` 4: float32, as on the CPU."""
        return self.config.num_hidden_layers * self.config.latent_width * itemsize

    # ---- memory of a worker

    def attention_worker_bytes(self, cache_tokens: int = 0, itemsize: int = BF16_BYTES) -> int:
        """Weights, the copies made of them, and a cache of so many tokens."""
        weights = self.attention_side_bytes + self.attention_copies_bytes
        return weights + cache_tokens * self.cache_bytes_per_token(itemsize)

    def expert_worker_bytes(self, slots: int) -> int:
        return slots * self.expert_bytes

    @property
    def default_redundancy(self) -> int:
        """Slots of the pool for second replicas unless configured: an eighth, in whole units."""
        unit = self.space.unit_size
        return -(-self.num_experts_total // (8 * unit)) * unit

    def slots_per_worker(self, workers: int, redundancy: int | None = None) -> int:
        """Slots of each of so many equal workers; `redundancy` None: the default one."""
        spare = self.default_redundancy if redundancy is None else redundancy
        return slots_needed(self.num_experts_total, workers, spare, self.space.unit_size)

    def slots_that_fit(self, memory_bytes: float) -> int:
        """Slots, in whole units, in so much usable memory."""
        unit = self.space.unit_size
        return int(memory_bytes // (unit * self.expert_bytes)) * unit

    def expert_workers_needed(self, memory_bytes: float, redundancy: int | None = None) -> int:
        """The fewest workers of so much usable memory that hold all experts and the replicas.

        Raises ValueError if one cannot hold even a single unit.
        """
        slots, unit = self.slots_that_fit(memory_bytes), self.space.unit_size
        if not slots:
            raise ValueError(
                f"{memory_bytes / 1e9:.1f} GB hold none of {self.name}'s units of {unit} experts "
                f"({unit * self.expert_bytes / 1e9:.2f} GB)"
            )
        spare = self.default_redundancy if redundancy is None else redundancy
        return -(-(self.num_experts_total + spare) // slots)

    @property
    def _unquantised_bytes(self) -> int:
        return FLOAT32_BYTES if self.weights == "float32" else BF16_BYTES


def _stored_as(config: ModelConfig) -> WeightType:
    if config.quantization is not None or config.torch_dtype == "float8_e4m3fn":
        return "fp8"
    return "bf16" if config.torch_dtype == "bfloat16" else "float32"
