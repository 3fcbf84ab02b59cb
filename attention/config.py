"""Settings of an attention worker."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AttentionConfig(BaseModel):
    """Sizes and switches of one attention worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 64
    """Requests that run at the same time; more wait."""
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=65536)] = 512
    """Token budget of a step: decodes first, the rest for prompt chunks."""
    block_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Tokens of a cache block: the unit of allocation and of prefix sharing. None: 16 on the CPU,
    64 on a GPU."""
    num_kv_blocks: Annotated[int, Field(ge=1)] | None = None
    """Blocks of the cache; None: as many as kv_cache_bytes holds."""
    kv_cache_bytes: Annotated[int, Field(ge=1)] | None = None
    """Memory of the cache, all layers together; used when num_kv_blocks is None. None: 512 MiB on
    the CPU, on a GPU what gpu_memory_utilization leaves beside the weights."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """auto: float32 on the CPU, bfloat16 on a GPU. fp8, on a GPU only: values of 8 bits with a
    scale for each 128 of them, the rotated key in bfloat16."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Part of the worker's share of a GPU (all of it, or num_gpus) that weights and cache take,
    used when neither num_kv_blocks nor kv_cache_bytes is given."""
    enable_prefix_caching: bool = True
    """Share the blocks of equal prompt prefixes (of equal cache_salt)."""
    cuda_graphs: bool = True
    """On a GPU: record the steps of decodes at the start, so that one launch a layer is enough."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Prompt and new tokens of a request at most; None: what the model allows."""
    deterministic: bool = False
    """Bit-identical rows whatever the batch, the chunking and the placement; slower."""

    @model_validator(mode="after")
    def _budget_covers_all_decodes(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs "
                f"{self.max_num_seqs}: raise it, each running request needs one token a step"
            )
        return self
