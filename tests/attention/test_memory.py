"""Sizes of the cache: bytes of a token, blocks of a share, and what is refused with a way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention.config import AttentionConfig
from attention.kernels.gpu.cache_layout import CacheLayout
from attention.memory import (
    cache_bytes_per_token,
    cache_room,
    context_length,
    plan_cache,
    row_bytes,
)
from cluster.deploy.known_models import known_model

V3, V2_LITE = known_model("v3").config, known_model("v2-lite").config
GB = 10**9


def engine(**settings: Any) -> AttentionConfig:
    return AttentionConfig(**settings)


def test_bytes_of_a_token() -> None:
    assert [row_bytes(V3, dtype) for dtype in ("float32", "bfloat16", "fp8")] == [2304, 1152, 656]
    assert cache_bytes_per_token(V2_LITE, "bfloat16") == 27 * 576 * 2
    odd = V2_LITE.model_copy(update={"kv_lora_rank": 132, "qk_rope_head_dim": 6})
    assert row_bytes(odd, "fp8") == 160  # 132 + 2 scales of 4 + 6 * 2 = 152, filled up


@pytest.mark.parametrize("model", [V3, V2_LITE])
def test_rows_are_those_of_the_kernels(model: Any) -> None:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    for name, dtype in dtypes.items():
        layout = CacheLayout(model.kv_lora_rank, model.qk_rope_head_dim, dtype)
        assert layout.row_bytes == row_bytes(model, name)


def test_host_and_gpu_have_sizes_of_their_own() -> None:
    host = plan_cache(engine(), V2_LITE)
    assert (host.block_size, host.dtype) == (16, "float32")
    assert host.num_blocks == 512 * 2**20 // (16 * 27 * 576 * 4)
    assert host.max_model_len == host.num_blocks * 16
    gpu = plan_cache(engine(), V2_LITE, on_gpu=True, room_bytes=20 * GB)
    assert (gpu.block_size, gpu.dtype) == (64, "bfloat16")
    assert gpu.num_blocks == 20 * GB // (64 * 27 * 576 * 2)
    assert gpu.max_model_len == V2_LITE.max_position_embeddings


def test_what_is_said_stands() -> None:
    said = engine(block_size=32, num_kv_blocks=10, kv_cache_dtype="fp8")
    plan = plan_cache(said, V3, on_gpu=True, room_bytes=1)
    assert (plan.num_blocks, plan.block_size, plan.dtype) == (10, 32, "fp8")
    assert plan.max_model_len == 320
    by_bytes = engine(kv_cache_bytes=7 * 64 * 61 * 656 + 5, kv_cache_dtype="fp8")
    assert plan_cache(by_bytes, V3, on_gpu=True).num_blocks == 7


def test_the_front_end_knows_the_context_without_the_device() -> None:
    assert context_length(engine(), V3, on_gpu=True) == V3.max_position_embeddings
    assert context_length(engine(max_model_len=4096), V3, on_gpu=True) == 4096
    room = 4096 * 61 * 1152
    assert plan_cache(engine(max_model_len=4096), V3, on_gpu=True, room_bytes=room).num_blocks == 64


def test_room_is_the_share_less_the_weights() -> None:
    assert cache_room(0, 0.9, 6 * GB) == 512 * 2**20  # a device that is played on the CPU
    assert cache_room(40 * GB, 0.9, 6 * GB) == 30 * GB
    with pytest.raises(ValueError, match=r"weights take 6.00 GB, .* 0.9 of 5.00 GB is less"):
        cache_room(5 * GB, 0.9, 6 * GB)


def test_a_gpu_that_cannot_hold_one_request_names_the_largest_that_it_can() -> None:
    room = 1000 * 61 * 1152
    with pytest.raises(ValueError, match=r"960 tokens, and one request may have 163840: set "):
        plan_cache(engine(), V3, on_gpu=True, room_bytes=room)
    assert plan_cache(engine(max_model_len=960), V3, on_gpu=True, room_bytes=room).num_blocks == 15
    with pytest.raises(ValueError, match=r"163840: raise gpu_memory_utilization"):
        plan_cache(engine(), V3, on_gpu=True, room_bytes=1000)


@pytest.mark.parametrize(
    ("settings", "on_gpu", "text"),
    [
        ({"kv_cache_bytes": 1000}, False, "holds no block, raise it to"),
        ({"kv_cache_bytes": 1000}, True, "holds no block, raise it to"),
        ({"kv_cache_dtype": "fp8"}, False, "needs a GPU"),
        ({"kv_cache_dtype": "bfloat16"}, False, "needs a GPU"),
        ({"max_model_len": 10**6}, True, "the model allows 163840"),
        ({"max_model_len": 65, "num_kv_blocks": 1}, True, "the cache holds 64"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], on_gpu: bool, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plan_cache(engine(**settings), V3, on_gpu=on_gpu, room_bytes=GB)
