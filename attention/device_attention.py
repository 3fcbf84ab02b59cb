"""Multi-head latent attention of one layer on a device, in both forms; attention.mla has the math.

Tokens of a batch that attend absorbed go through one kernel over the paged cache. Prompt chunks in
the naive form gather their contexts' latents, expand them by one product with kv_b and attend in
one call, as many chunks at a time as EXPANDED_BYTES allow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.device_batch import ChunkGroup, DeviceBatch
from attention.device_weights import DeviceAttention
from attention.kernels.gpu.cache_layout import CacheLayout
from attention.kernels.gpu.mla_decode import FIXED_SPLITS, pick_num_splits
from attention.kernels.gpu.ops import attention_ops
from attention.layers import LATENT_NORM_EPS
from attention.mla import MlaSizes
from attention.rope import rope_table, softmax_scale
from experts.config import ModelConfig
from experts.device import ComputeDevice
from experts.device_layer import DeviceWeight, linear_device
from experts.kernels.gpu.ops import expert_ops

EXPANDED_BYTES = 2 << 30
EXPANDED_SHARE = 1 / 40
"""Of keys and values that exist at a time: 32,768 context tokens of V3 in bfloat16, in a small part
of a GPU a quarter of what gpu_memory_utilization leaves. A chunk on a longer context attends
absorbed: more arithmetic, no expansion."""


def max_expanded(sizes: MlaSizes, device: ComputeDevice) -> int:
    """Context tokens whose keys and values may exist at a time."""
    room = EXPANDED_BYTES
    if device.total_bytes:
        room = min(room, int(EXPANDED_SHARE * device.total_bytes))
    return room // (sizes.num_heads * (sizes.nope + sizes.value) * device.dtype.itemsize)


class DeviceMla:
    """The cache of all layers and how tokens attend to it."""

    def __init__(
        self,
        config: ModelConfig,
        cache: Tensor,
        device: ComputeDevice,
        max_model_len: int,
        deterministic: bool,
    ):
        """cache [layers, num_blocks, block_size, width]: of CacheLayout.new_cache."""
        self.sizes = sizes = MlaSizes.of(config)
        self.max_expanded = max_expanded(sizes, device)
        self._device = device
        self._max_context = max_model_len  # not a batch's: the cut follows nothing but its rows
        self._deterministic = deterministic
        self._ops = attention_ops(device.kernels)
        self._expert_ops = expert_ops(device.kernels)
        self._caches = list(cache.unbind(0))
        self._layout = CacheLayout.of(self._caches[0], sizes.latent, sizes.rope)
        self._rope = rope_table(config, max_model_len).to(device.device)
        self._scale = softmax_scale(config)

    def prefers_naive(self, num_new: int, context_len: int) -> bool:
        """Whether expanding the cached tokens pays for a chunk, and has room."""
        fits = context_len <= self.max_expanded
        return not self._deterministic and fits and self.sizes.prefers_naive(num_new, context_len)

    def attend(self, layer: int, weights: DeviceAttention, x: Tensor, batch: DeviceBatch) -> Tensor:
        """x [T, d], normed -> [T, d] like x; writes the tokens' latents to the layer's cache."""
        cache = self._caches[layer]
        q, kv_a = self._project(weights, x)
        self._ops.rotate_query_and_cache_latent(
            q, kv_a, weights.kv_a_norm, self._rope, batch.positions, batch.slots, cache
        )
        parts = []
        if batch.num_absorbed:
            queries = q[: batch.num_absorbed]
            num_splits = pick_num_splits(
                queries.shape[0],
                queries.shape[1],
                self._device.num_sms,
                self._max_context,
                deterministic=self._deterministic,
            )
            parts.append(self._absorbed(weights, queries, cache, batch, num_splits))
        parts += [self._naive(weights, q, cache, group) for group in batch.groups]
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._linear(values.flatten(1), weights.output)

    def warm_up(self, weights: DeviceAttention, x: Tensor, batch: DeviceBatch) -> None:
        """Compile both ways to attend absorbed, to whole and to cut contexts: which one a step
        takes depends on its rows. x [T, d] of a batch of padding only."""
        q, _ = self._project(weights, x)
        for num_splits in (1, FIXED_SPLITS):
            self._absorbed(weights, q, self._caches[0], batch, num_splits)

    def _project(self, weights: DeviceAttention, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [T, H, n + r] and kv_a [T, c + r], neither rotated; rows may lie apart."""
        rows = [self._linear(x, weight) for weight in weights.down]
        latent_width = self.sizes.latent + self.sizes.rope
        query, kv_a = rows[0], rows[-1][:, -latent_width:]
        if len(rows) == 1:
            query = query[:, :-latent_width]
        if weights.query_norm is not None and weights.query_up is not None:
            normed = self._ops.rms_norm(query, weights.query_norm, LATENT_NORM_EPS, x.dtype)
            query = self._linear(normed, weights.query_up)
        return query.view(x.shape[0], self.sizes.num_heads, -1), kv_a

    def _absorbed(
        self,
        weights: DeviceAttention,
        q: Tensor,
        cache: Tensor,
        batch: DeviceBatch,
        num_splits: int,
    ) -> Tensor:
        """q [num_absorbed, H, n + r], rotated -> [num_absorbed, H, v]."""
        u = self._ops.mla_decode(
            self._ops.multiply_heads(q, weights.w_uk),
            q[:, :, self.sizes.nope :],
            cache,
            batch.block_tables,
            batch.seq_ids,
            batch.context_lens,
            self._scale,
            num_splits=num_splits,
            native_fp8=self._device.fp8_matmul,
        )
        return self._ops.multiply_heads(u, weights.w_uv)

    def _naive(
        self, weights: DeviceAttention, q: Tensor, cache: Tensor, group: ChunkGroup
    ) -> Tensor:
        """q [T, H, n + r] of the batch, rotated -> [stop - start, H, v]."""
        latents = self._ops.gather_latents(cache, group.slots, self._layout, q.dtype)
        expanded = self._linear(latents[:, : self.sizes.latent], weights.kv_b)
        return self._ops.mla_prefill(
            q[group.start : group.stop],
            expanded.view(latents.shape[0], self.sizes.num_heads, -1),
            latents[:, self.sizes.latent :],
            group.cu_q,
            group.cu_k,
            group.max_q,
            self._scale,
        )

    def _linear(self, x: Tensor, weight: DeviceWeight) -> Tensor:
        return linear_device(x, weight, ops=self._expert_ops, deterministic=self._deterministic)
