"""Seeded paged caches, queries and ragged contexts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.kernels.gpu.cache_layout import CacheLayout, encode_rows
from gpu_check.compare import poison
from gpu_check.expert_data import random
from gpu_check.plan import Context
from gpu_check.shapes import ModelShape

BLOCK_SIZE = 64
SPARE_BLOCKS = 3
"""Blocks of nobody: they hold NaN, like the rest of a context's last block."""
_ROWS_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class Paged:
    """A layer's cache that holds the contexts of some sequences, their blocks in no order."""

    kv_cache: Tensor  # [num_blocks, block_size, width]
    block_tables: Tensor  # [B, max_blocks] int32
    context_lens: Tensor  # [B] int32
    layout: CacheLayout

    @property
    def seq_ids(self) -> Tensor:
        """One token of each sequence."""
        numbers = torch.arange(len(self.context_lens), device=self.context_lens.device)
        return numbers.int()


def paged(
    context: Context, shape: ModelShape, lengths: list[int], cache_dtype: torch.dtype
) -> Paged:
    """Everything that no context needs is NaN."""
    layout = CacheLayout(shape.kv_lora_rank, shape.qk_rope_head_dim, cache_dtype)
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    num_blocks = sum(counts) + SPARE_BLOCKS
    cache = poison(layout.new_cache(1, num_blocks, BLOCK_SIZE, context.device)[0])
    order = torch.randperm(num_blocks, device=context.device, generator=context.generator(30))
    tables = torch.zeros(len(lengths), max(1, *counts), dtype=torch.int32, device=context.device)
    first, used = 0, []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = order[first : first + count]
        tables[row, :count] = blocks.int()
        slots = blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=context.device)
        used.append(slots.flatten()[:length])
        first += count
    rows = cache.view(-1, layout.width)
    for part in torch.cat(used).split(_ROWS_AT_A_TIME):
        values = random(context, 31 + int(part[0]), len(part), shape.latent_width)
        rows[part] = encode_rows(values, layout)
    lens = torch.tensor(lengths, dtype=torch.int32, device=context.device)
    return Paged(cache, tables, lens, layout)


def queries(
    context: Context, shape: ModelShape, num_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """q_latent [T, H, c] and q_pe [T, H, r], the latter part of wider rows as in the model."""
    heads, latent, nope = shape.num_attention_heads, shape.kv_lora_rank, shape.qk_nope_head_dim
    q_latent = random(context, 32, num_tokens, heads, latent).to(dtype)
    q = random(context, 33, num_tokens, heads, shape.query_width).to(dtype)
    return q_latent, q[:, :, nope:]


def score_scale(shape: ModelShape) -> float:
    """Of random queries and keys: scores of a few units, so that a softmax has something to do."""
    return 2.0 * shape.latent_width**-0.5


def rope_rows(context: Context, shape: ModelShape, num_positions: int) -> Tensor:
    """[positions, r]: cos, then sin, of random angles."""
    angles = random(context, 34, num_positions, shape.qk_rope_head_dim // 2, std=3.0)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
