"""The attention tier's weights in the memory of a device.

Loaded a layer at a time from the mapped files. Plain matrices take the dtype of the device's
activations, fp8 ones stay as they are with their scales; norms are float32. What reads the same
rows is one matrix: the down projections of query and latent (for a model without query compression
the query projection itself), and gate and up of an MLP.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.mla import MlaSizes
from attention.tensor_shapes import attention_tensor_shapes
from attention.weights import (
    AttentionWeights,
    LayerWeights,
    load_layer,
    load_norm,
)
from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from experts.device_layer import DeviceMlp, DeviceWeight, to_device_weight
from experts.linear import Weight
from experts.tensor_files import SCALE_BLOCK

logger = logging.getLogger(__name__)

LOG_EVERY = 10
"""Layers between two lines of the log."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceAttention:
    """One layer's MLA. Without query compression query_norm and query_up are None.

    w_uk and w_uv are views of kv_b.
    """

    down: tuple[DeviceWeight, ...]
    """[q + c + r, d] in one piece or two: q_a (or q_proj), then kv_a."""
    query_norm: Tensor | None  # [q] float32
    query_up: DeviceWeight | None  # [H * (n + r), q]
    kv_a_norm: Tensor  # [c] float32
    kv_b: DeviceWeight  # [H * (n + v), c]
    w_uk: Tensor  # [H, c, n]
    w_uv: Tensor  # [H, v, c]
    output: DeviceWeight  # [d, H * v]

    @property
    def num_bytes(self) -> int:
        norms = [norm for norm in (self.query_norm, self.kv_a_norm) if norm is not None]
        matrices = [*self.down, self.query_up, self.kv_b, self.output]
        return sum(norm.nbytes for norm in norms) + sum(w.num_bytes for w in matrices if w)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceLayer:
    """A decoder layer. `mlp` is the dense FFN, or the shared experts of a MoE layer."""

    input_norm: Tensor  # [d] float32
    attention: DeviceAttention
    post_attention_norm: Tensor  # [d] float32
    mlp: DeviceMlp
    is_moe: bool

    @property
    def num_bytes(self) -> int:
        norms = self.input_norm.nbytes + self.post_attention_norm.nbytes
        return norms + self.attention.num_bytes + self.mlp.num_bytes


@dataclass(frozen=True, slots=True, eq=False)
class DeviceModelWeights:
    """embedding [V, d] in the device's dtype; norm [d] float32; lm_head [V, d]."""

    embedding: Tensor
    layers: tuple[DeviceLayer, ...]
    norm: Tensor
    lm_head: DeviceWeight

    @property
    def num_bytes(self) -> int:
        ends = self.embedding.nbytes + self.norm.nbytes + self.lm_head.num_bytes
        return ends + sum(layer.num_bytes for layer in self.layers)


def load_device_weights(checkpoint: Checkpoint, device: ComputeDevice) -> DeviceModelWeights:
    """Copy all weights of this tier. Raises CheckpointError."""
    config, layers = checkpoint.config, []
    checkpoint.require(attention_tensor_shapes(config))
    for index in range(config.num_hidden_layers):
        host = load_layer(checkpoint, index)
        layers.append(to_device_layer(host, MlaSizes.of(config), device))
        done = index + 1
        if done % LOG_EVERY == 0 or done == config.num_hidden_layers:
            num_bytes = sum(layer.num_bytes for layer in layers)
            logger.info(
                "weights: %d of %d layers, %.2f GB", done, config.num_hidden_layers, num_bytes / 1e9
            )
    return DeviceModelWeights(
        embedding=checkpoint.tensor("model.embed_tokens.weight").to(device.device, device.dtype),
        layers=tuple(layers),
        norm=load_norm(checkpoint, "model.norm").to(device.device),
        lm_head=to_device_weight(checkpoint.weight("lm_head.weight"), device),
    )


def to_device_layer(host: LayerWeights, sizes: MlaSizes, device: ComputeDevice) -> DeviceLayer:
    """A copy of a layer."""
    return DeviceLayer(
        input_norm=host.input_norm.to(device.device),
        attention=_to_device_attention(host.attention, sizes, device),
        post_attention_norm=host.post_attention_norm.to(device.device),
        mlp=DeviceMlp.load(host.mlp, device),
        is_moe=host.is_moe,
    )


def _to_device_attention(
    host: AttentionWeights, sizes: MlaSizes, device: ComputeDevice
) -> DeviceAttention:
    kv_b = to_device_weight(host.kv_b, device)
    per_head = kv_b.data.view(sizes.num_heads, sizes.nope + sizes.value, sizes.latent)
    query, norm = host.query, host.query.norm
    down = query.up if query.down is None else query.down
    return DeviceAttention(
        down=tuple(to_device_weight(weight, device) for weight in stacked(down, host.kv_a)),
        query_norm=None if norm is None else norm.to(device.device),
        query_up=None if query.down is None else to_device_weight(query.up, device),
        kv_a_norm=host.kv_a_norm.to(device.device),
        kv_b=kv_b,
        w_uk=per_head[:, : sizes.nope].transpose(1, 2),
        w_uv=per_head[:, sizes.nope :],
        output=to_device_weight(host.output, device),
    )


def stacked(upper: Weight, lower: Weight) -> tuple[Weight, ...]:
    """One matrix with the rows of both; both as they are when the upper one does not end with a
    whole block of scales (released models' do)."""
    if upper.data.dtype != lower.data.dtype:
        return upper, lower
    if upper.scale_inv is None or lower.scale_inv is None:
        return (Weight(torch.cat([upper.data, lower.data])),)
    if upper.shape[0] % SCALE_BLOCK:
        return upper, lower
    data = torch.cat([upper.data.view(torch.uint8), lower.data.view(torch.uint8)])
    scales = torch.cat([upper.scale_inv, lower.scale_inv])
    return (Weight(data.view(upper.data.dtype), scales),)
