"""How large an attention worker's cache is and of what; pure arithmetic, no torch.

    host     float32, 512 MiB unless given: pages that the system hands out as they are used
    device   bfloat16, what its share of the GPU leaves beside the weights:
             room = gpu_memory_utilization * share - weights;   blocks = room // bytes of a block

A row of the cache is one token of one layer: the latent (c values), then the rotated key (r). In
fp8 [1]: c bytes, a float32 scale for each 128 of them, r bfloat16, filled up to 16 bytes; 656 for
c = 512, r = 64.

1. DeepSeek, FlashMLA, README: layout of the fp8 KV cache of DeepSeek-V3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attention.config import AttentionConfig
from experts.config import ModelConfig

CacheDtype = Literal["float32", "bfloat16", "fp8"]

HOST_CACHE_BYTES = 512 * 2**20
HOST_BLOCK_SIZE = 16
GPU_BLOCK_SIZE = 64
"""Tokens that a kernel reads as one tile."""
FP8_GROUP = 128
"""Values that share a scale."""
ROW_ALIGNMENT_BYTES = 16
"""An fp8 row begins where 16 bytes can be read at once."""


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The cache of one worker, and the longest request that it takes."""

    num_blocks: int
    block_size: int
    dtype: CacheDtype
    max_model_len: int


def plan_cache(
    config: AttentionConfig, model: ModelConfig, *, on_gpu: bool = False, room_bytes: int = 0
) -> CachePlan:
    """room_bytes: from `cache_room`; counts on a GPU, if the settings name no size.

    Raises ValueError that says what does not fit and what would.
    """
    dtype, size = cache_dtype(config, on_gpu), block_size(config, on_gpu)
    num_blocks = _configured_blocks(config, model, on_gpu)
    if num_blocks is None:
        num_blocks = room_bytes // (size * cache_bytes_per_token(model, dtype))
        _check_holds_one(config, model, num_blocks * size, room_bytes)
    return CachePlan(num_blocks, size, dtype, context_length(config, model, on_gpu=on_gpu))


def context_length(config: AttentionConfig, model: ModelConfig, *, on_gpu: bool = False) -> int:
    """Longest prompt and answer: what was asked for, else what the model allows and a cache of
    configured size holds. Known without the device: a cache that takes what is left of a GPU must
    hold one such request, or its worker does not start. Raises ValueError.
    """
    room = model.max_position_embeddings
    num_blocks = _configured_blocks(config, model, on_gpu)
    held = "as many tokens as fit"
    if num_blocks is not None:
        num_tokens = num_blocks * block_size(config, on_gpu)
        room, held = min(room, num_tokens), f"{num_tokens}"
    if config.max_model_len is None:
        return room
    if config.max_model_len > room:
        raise ValueError(
            f"max_model_len {config.max_model_len} exceeds {room}: the model allows "
            f"{model.max_position_embeddings} tokens and the cache holds {held}"
        )
    return config.max_model_len


def cache_dtype(config: AttentionConfig, on_gpu: bool) -> CacheDtype:
    """As configured, else float32 on the host and bfloat16 on a GPU. Raises ValueError."""
    if config.kv_cache_dtype == "auto":
        return "bfloat16" if on_gpu else "float32"
    if config.kv_cache_dtype != "float32" and not on_gpu:
        raise ValueError(
            f"kv_cache_dtype {config.kv_cache_dtype} needs a GPU, the CPU kernels read float32: "
            "use auto"
        )
    return config.kv_cache_dtype


def block_size(config: AttentionConfig, on_gpu: bool) -> int:
    """Tokens of a block."""
    return config.block_size or (GPU_BLOCK_SIZE if on_gpu else HOST_BLOCK_SIZE)


def row_bytes(model: ModelConfig, dtype: CacheDtype) -> int:
    """One token of one layer."""
    if dtype != "fp8":
        return model.latent_width * (4 if dtype == "float32" else 2)
    latent, rope = model.kv_lora_rank, model.qk_rope_head_dim
    num_bytes = latent + 4 * -(-latent // FP8_GROUP) + 2 * rope
    return -(-num_bytes // ROW_ALIGNMENT_BYTES) * ROW_ALIGNMENT_BYTES


def cache_bytes_per_token(model: ModelConfig, dtype: CacheDtype) -> int:
    """Over all main layers. V2-Lite in bfloat16: 27 * 576 * 2."""
    return model.num_hidden_layers * row_bytes(model, dtype)


def cache_room(share_bytes: int, utilization: float, weights_bytes: int) -> int:
    """Bytes for the cache. share_bytes: of the GPU's memory, what this process may use, 0 where a
    device is played on the CPU; what `utilization` leaves of it is for activations, graphs and CUDA
    itself. Raises ValueError."""
    if not share_bytes:
        return HOST_CACHE_BYTES
    room = int(utilization * share_bytes) - weights_bytes
    if room <= 0:
        raise ValueError(
            f"the attention weights take {weights_bytes / 1e9:.2f} GB, gpu_memory_utilization "
            f"{utilization:g} of {share_bytes / 1e9:.2f} GB is less: raise attention.num_gpus, or "
            "use a larger GPU"
        )
    return room


def _configured_blocks(config: AttentionConfig, model: ModelConfig, on_gpu: bool) -> int | None:
    """None: the cache takes what the GPU has left. Raises ValueError if not even one block fits."""
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_cache_bytes is None and on_gpu:
        return None
    num_bytes = config.kv_cache_bytes or HOST_CACHE_BYTES
    dtype, size = cache_dtype(config, on_gpu), block_size(config, on_gpu)
    block_bytes = size * cache_bytes_per_token(model, dtype)
    if num_bytes < block_bytes:
        raise ValueError(f"kv_cache_bytes {num_bytes} holds no block, raise it to {block_bytes}")
    return num_bytes // block_bytes


def _check_holds_one(
    config: AttentionConfig, model: ModelConfig, num_tokens: int, room_bytes: int
) -> None:
    wanted = context_length(config, model, on_gpu=True)
    if num_tokens >= wanted:
        return
    lower = f"set max_model_len to {num_tokens} or less, or " if num_tokens else ""
    raise ValueError(
        f"the GPU has {room_bytes / 1e9:.2f} GB left for the cache, {num_tokens} tokens, and one "
        f"request may have {wanted}: {lower}raise gpu_memory_utilization or attention.num_gpus"
    )
