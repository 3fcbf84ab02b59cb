"""The decoder over a flat batch of tokens of many sequences.

T tokens of one step lie in one [T, d] array, whatever their sequences: first those that attend in
the absorbed form (decodes, short chunks on long prefixes; all of them in deterministic mode), then
whole prompt chunks in the naive form. Positions, cache slots and block tables say who belongs
where.

    h = embedding[ids] for each layer:  h += attention(norm(h));  h += experts(norm(h)) +
    shared(norm(h))  (or h += mlp(norm(h))) logits = lm_head(norm(h)), only for the rows that are
    asked for
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attention.heads import multiply_heads
from attention.kernels.mla_decode import mla_decode
from attention.layers import LATENT_NORM_EPS, add_rms_norm, rms_norm, rotate_query_and_cache_latent
from attention.mla import MlaSizes, naive_attention
from attention.rope import rope_table, softmax_scale
from attention.sampler import Sampled, SampleRow, sample
from attention.weights import LayerWeights, ModelWeights, QueryWeights
from experts.config import ModelConfig
from experts.layer import swiglu
from experts.linear import linear
from router.client import MoeClient

MIN_WAIT_S = 1.0
"""What every layer may take for its experts: a deadline that passes in the middle of a step that
goes well must not cost the others the step."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Tokens start..stop-1 of the batch: the newest of a context that lies in these cache slots."""

    start: int
    stop: int
    slots: Tensor
    """[context] int64, the chunk's own included."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step's tokens. Tokens 0..num_absorbed-1 attend absorbed, the rest by `chunks`."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int64: block * block_size + offset
    num_absorbed: int
    seq_ids: Tensor  # [num_absorbed] int32, row of block_tables
    context_lens: Tensor  # [num_absorbed] int32, the token included
    block_tables: Tensor  # [S, max_blocks] int32
    chunks: tuple[Chunk, ...]


class Decoder(Protocol):
    """What the runner needs of a model, wherever that computes. One thread at a time."""

    @property
    def num_renormalised(self) -> int:
        """Grows whenever a forward pass had to do without some experts."""

    def prefers_naive(self, num_new: int, context_len: int) -> bool:
        """Whether a chunk of num_new tokens should attend in the naive form."""

    def forward(self, batch: Batch, wait_until_s: float | None = None) -> Tensor:
        """Hidden states after the last layer, [T, d] float32, before the final norm; good until the
        next call.

        Writes the latents of all tokens to the cache. Raises what the MoE client raises; the cache
        then holds rubbish in the slots of this batch and nowhere else. wait_until_s: the time (of
        time.monotonic) until which it may wait for experts, if the MoE client's own limit is later.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, d] float32 -> [R, V] float32, where the model computes."""

    def sample(
        self, hidden: Tensor, places: Sequence[int], rows: Sequence[SampleRow]
    ) -> list[Sampled]:
        """A token after each of these rows of `hidden`."""


def wait_limit_s(wait_until_s: float | None) -> float | None:
    """Seconds a layer may wait for its experts: one in good order gets its time even when the
    step's is over."""
    return None if wait_until_s is None else max(MIN_WAIT_S, wait_until_s - time.monotonic())


class DecoderModel:
    """The decoder on the CPU: its kernels over the mapped weights. See Decoder."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        moe: MoeClient,
        cache: Tensor,
        max_model_len: int,
        deterministic: bool = False,
    ):
        """cache [layers, num_blocks, block_size, c + r] float32; the model owns it from now on."""
        self.config = config
        self.deterministic = deterministic
        self.sizes = MlaSizes.of(config)
        self._weights = weights
        self._moe = moe
        self._caches = list(cache.unbind(0))
        self._rope = rope_table(config, max_model_len)
        self._scale = softmax_scale(config)

    @torch.inference_mode()
    def forward(self, batch: Batch, wait_until_s: float | None = None) -> Tensor:
        eps = self.config.rms_norm_eps
        hidden = self._weights.embedding[batch.token_ids].float()
        delta: Tensor | None = None
        for index, layer in enumerate(self._weights.layers):
            if delta is None:
                x = rms_norm(hidden, layer.input_norm, eps)
            else:
                x = add_rms_norm(hidden, delta, layer.input_norm, eps)
            delta = self._attend(index, layer, x, batch)
            x = add_rms_norm(hidden, delta, layer.post_attention_norm, eps)
            delta = self._feed_forward(index, layer, x, wait_until_s)
        return hidden if delta is None else hidden.add_(delta)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        x = rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps)
        return linear(x, self._weights.lm_head, deterministic=self.deterministic)

    def sample(
        self, hidden: Tensor, places: Sequence[int], rows: Sequence[SampleRow]
    ) -> list[Sampled]:
        last = hidden if len(places) == hidden.shape[0] else hidden[places]
        return sample(self.logits(last).numpy(), rows)

    def prefers_naive(self, num_new: int, context_len: int) -> bool:
        return not self.deterministic and self.sizes.prefers_naive(num_new, context_len)

    @property
    def num_renormalised(self) -> int:
        return self._moe.num_renormalised

    def _feed_forward(
        self, index: int, layer: LayerWeights, x: Tensor, wait_until_s: float | None
    ) -> Tensor:
        """The dense FFN, or routed plus shared experts; the shared run while the others fly."""
        if not layer.is_moe:
            return swiglu(x, layer.mlp, deterministic=self.deterministic)
        ticket = self._moe.begin(index, x, wait_limit_s(wait_until_s))
        shared = swiglu(x, layer.mlp, deterministic=self.deterministic)
        return shared.add_(self._moe.finish(ticket))

    def _attend(self, index: int, layer: LayerWeights, x: Tensor, batch: Batch) -> Tensor:
        weights, cache = layer.attention, self._caches[index]
        q = self._queries(weights.query, x)
        kv_a = linear(x, weights.kv_a, deterministic=self.deterministic)
        flat = cache.view(-1, cache.shape[2])
        rotate_query_and_cache_latent(
            q, kv_a, weights.kv_a_norm, self._rope, batch.positions, batch.slots, flat
        )
        parts = []
        if batch.num_absorbed:
            parts.append(self._absorbed(layer, q[: batch.num_absorbed], cache, batch))
        for chunk in batch.chunks:
            latents = flat[chunk.slots]
            queries = q[chunk.start : chunk.stop]
            parts.append(naive_attention(queries, latents, weights, self.sizes, self._scale))
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return linear(values, weights.output, deterministic=self.deterministic)

    def _queries(self, weights: QueryWeights, x: Tensor) -> Tensor:
        """[T, H, n + r], not rotated."""
        if weights.down is not None and weights.norm is not None:
            low = linear(x, weights.down, deterministic=self.deterministic)
            x = rms_norm(low, weights.norm, LATENT_NORM_EPS)
        q = linear(x, weights.up, deterministic=self.deterministic)
        return q.view(x.shape[0], self.sizes.num_heads, -1)

    def _absorbed(self, layer: LayerWeights, q: Tensor, cache: Tensor, batch: Batch) -> Tensor:
        """q [num_absorbed, H, n + r], rotated -> [num_absorbed, H * v]."""
        u = mla_decode(
            multiply_heads(q, layer.attention.w_uk),
            q[:, :, self.sizes.nope :],
            cache,
            batch.block_tables,
            batch.seq_ids,
            batch.context_lens,
            self._scale,
        )
        return multiply_heads(u, layer.attention.w_uv).flatten(1)
