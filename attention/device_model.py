"""The decoder on a device: the steps of attention.model over kernels that wait for nothing.

The residual stream is float32; normed rows, and with them all products, take the device's dtype. A
step is cut where rows leave for the routed experts:

    between 0:        embed, layers 0 .. first MoE layer up to its experts' input x
    shared i:         hidden += shared experts(x), while the routed ones are on their way
    between i + 1:    hidden += routed, then on to the next MoE layer's x, or to the end

These segments are functions over the buffers of a Step. A step of absorbed tokens only (decodes,
short chunks) has static buffers, and segments recorded once for each bucket of rows
(attention.graphs); with a MoE client that can be recorded too the whole step is one graph. Other
steps run the same functions over buffers of their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attention.device_attention import DeviceMla
from attention.device_batch import NO_TOKENS, StaticBatch, upload
from attention.device_hop import is_capturable, open_hop
from attention.device_sampling import sample_on_device
from attention.device_steps import Program, Step
from attention.device_weights import DeviceLayer, DeviceModelWeights
from attention.graphs import bucket_of, bucket_sizes, can_record, open_recorder
from attention.kernels.gpu.ops import attention_ops
from attention.model import Batch, Chunk
from attention.sampler import Sampled, SampleRow
from experts.config import ModelConfig
from experts.device import ComputeDevice
from experts.device_layer import linear_device, swiglu_device
from experts.kernels.gpu.ops import expert_ops
from experts.staging import Staging
from router.client import MoeClient

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = (16, 17)
"""A step for each tile of the products of few rows, see experts.kernels.gpu.linear."""
WARM_UP_TOKENS_FP8 = 513
"""The tile of many rows, which only fp8 weights have: a long chunk's, or a long context's while it
is expanded."""


class DeviceDecoder:
    """Weights, cache and the forward pass on a device. See attention.model.Decoder."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DeviceModelWeights,
        moe: MoeClient,
        cache: Tensor,
        device: ComputeDevice,
        *,
        max_model_len: int,
        max_num_seqs: int,
        use_graphs: bool = True,
        deterministic: bool = False,
    ):
        """cache: of CacheLayout.new_cache; the model owns it from now on. max_num_seqs: tokens of
        the largest step that is recorded."""
        self.deterministic = deterministic
        self._config = config
        self._weights = weights
        self._moe = moe
        self._notes = moe if is_capturable(moe) else None
        self._device = device
        self._ops = attention_ops(device.kernels)
        self._expert_ops = expert_ops(device.kernels)
        self._staging = Staging(device)
        self._hop = open_hop(moe, self._staging)
        self._mla = DeviceMla(config, cache, device, max_model_len, deterministic)
        self._buckets = bucket_sizes(max_num_seqs) if use_graphs and can_record(device) else ()
        self._recorder = open_recorder(device.device)
        self._recorded: dict[int, Program] = {}
        capacity = self._buckets[-1] if self._buckets else 0
        table_width = -(-max_model_len // cache.shape[2])
        self._static = StaticBatch(capacity, table_width, device.device)
        self._buffers = Step.new(self._static.batch, config.hidden_size, device)

    @property
    def num_renormalised(self) -> int:
        return self._moe.num_renormalised

    def prefers_naive(self, num_new: int, context_len: int) -> bool:
        return self._mla.prefers_naive(num_new, context_len)

    @torch.inference_mode()
    def forward(self, batch: Batch, wait_until_s: float | None = None) -> Tensor:
        num_tokens = len(batch.token_ids)
        bucket = None if batch.chunks else bucket_of(num_tokens, self._buckets)
        if bucket is None:
            on_device = upload(batch, self._mla.max_expanded, self._staging)
            step = Step.new(on_device, self._config.hidden_size, self._device)
            program = self._program(step)
        else:
            program = self._recorded_program(bucket)
            self._static.load(batch, self._staging)
            step = self._buffers.first(num_tokens)
        if self._notes is not None:
            self._notes.forget()
        program.play(step, self._hop, wait_until_s)
        return step.hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        x = self._ops.rms_norm(
            hidden, self._weights.norm, self._config.rms_norm_eps, self._device.dtype
        )
        return linear_device(
            x,
            self._weights.lm_head,
            ops=self._expert_ops,
            out_dtype=torch.float32,
            deterministic=self.deterministic,
        )

    @torch.inference_mode()
    def sample(
        self, hidden: Tensor, places: Sequence[int], rows: Sequence[SampleRow]
    ) -> list[Sampled]:
        """See Decoder. A MoE client that only notes rows that are not finite is asked here, where
        the step is waited for anyway: raises NonFiniteInput."""
        num_rows = hidden.shape[0]
        if len(places) < num_rows:
            (index,) = self._staging.to_device(torch.tensor(places))
            hidden = hidden.index_select(0, index)
        sampled = sample_on_device(self.logits(hidden), rows, self._staging)
        if self._notes is not None:
            self._notes.check(num_rows)
        return sampled

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile kernels and record every bucket now, and not in the first step that needs it."""
        start_s = time.monotonic()
        for num_tokens in WARM_UP_TOKENS:
            self.logits(self._warm_up_prompt(num_tokens))
        if any(layer.attention.output.scales is not None for layer in self._weights.layers):
            self._warm_up_prompt(WARM_UP_TOKENS_FP8)
        self._warm_up_absorbed()
        for number, bucket in enumerate(reversed(self._buckets), 1):  # the pool is largest at once
            self._recorded_program(bucket)
            logger.info("graphs: %d of %d buckets, %d rows", number, len(self._buckets), bucket)
        logger.info("ready for steps after %.1f s", time.monotonic() - start_s)

    def _warm_up_prompt(self, num_tokens: int) -> Tensor:
        """Run the segments of a naive chunk that leaves nothing in the cache; the stream."""
        nowhere = torch.full((num_tokens,), -1)
        prompt = replace(
            NO_TOKENS,
            token_ids=torch.zeros(num_tokens, dtype=torch.int64),
            positions=torch.zeros(num_tokens, dtype=torch.int32),
            slots=nowhere,
            chunks=(Chunk(0, num_tokens, nowhere),),
        )
        on_device = upload(prompt, self._mla.max_expanded, self._staging)
        step = Step.new(on_device, self._config.hidden_size, self._device)
        program = self._program(step)
        for segment in (*program.between, *program.shared):
            segment()
        return step.hidden

    def _warm_up_absorbed(self) -> None:
        padding = StaticBatch(2, 1, self._device.device)
        padding.load(NO_TOKENS, self._staging)
        step = Step.new(padding.batch, self._config.hidden_size, self._device)
        self._mla.warm_up(self._weights.layers[0].attention, step.x, step.batch)

    def _recorded_program(self, bucket: int) -> Program:
        """Recorded at first use, over padding only: what that computes harms nobody."""
        if bucket not in self._recorded:
            self._static.load(NO_TOKENS, self._staging)
            step = self._buffers.first(bucket)
            program = self._program(step)
            if is_capturable(self._moe):
                whole = partial(program.play, step, self._hop, None)
                program = Program(hops=(), between=(whole,), shared=())
            self._recorded[bucket] = program.recorded(self._recorder)
        return self._recorded[bucket]

    def _program(self, step: Step) -> Program:
        """The segments over these buffers."""
        layers = self._weights.layers
        hops = tuple(index for index, layer in enumerate(layers) if layer.is_moe)
        starts = (0, *(index + 1 for index in hops))
        return Program(
            hops,
            between=tuple(partial(self._advance, step, start) for start in starts),
            shared=tuple(partial(self._share, step, layers[index]) for index in hops),
        )

    def _advance(self, step: Step, start: int) -> None:
        """From layer `start` up to the input of the next routed experts, or to the end."""
        hidden, eps, dtype = step.hidden, self._config.rms_norm_eps, self._device.dtype
        delta = step.routed if start else self._embed(step)
        for index, layer in enumerate(self._weights.layers[start:], start):
            x = self._ops.add_rms_norm(hidden, delta, layer.input_norm, eps, dtype)
            delta = self._mla.attend(index, layer.attention, x, step.batch)
            x = self._ops.add_rms_norm(hidden, delta, layer.post_attention_norm, eps, dtype)
            if layer.is_moe:
                step.x.copy_(x)
                return
            delta = self._mlp(x, layer)
        hidden.add_(delta)

    def _embed(self, step: Step) -> Tensor:
        """What is added to a residual stream of zeros."""
        step.hidden.zero_()
        return self._weights.embedding.index_select(0, step.batch.token_ids)

    def _share(self, step: Step, layer: DeviceLayer) -> None:
        step.hidden.add_(self._mlp(step.x, layer))

    def _mlp(self, x: Tensor, layer: DeviceLayer) -> Tensor:
        return swiglu_device(x, layer.mlp, ops=self._expert_ops, deterministic=self.deterministic)
