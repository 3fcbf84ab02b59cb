"""A whole model of seeded random weights, made on the device: no files.

`SeededCheckpoint` has what the loaders ask of a checkpoint, so the model is put together by the
code that serves real ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.device_model import DeviceDecoder
from attention.device_weights import DeviceModelWeights, load_device_weights
from attention.kernels.gpu.cache_layout import CacheLayout
from attention.tensor_shapes import attention_tensor_shapes
from cluster.deploy.known_models import KNOWN
from cluster.tiny_presets import PRESETS
from experts.config import ModelConfig
from experts.device import ComputeDevice
from experts.linear import Weight
from experts.tensor_shapes import expert_tensor_shapes
from gpu_check.attention_data import BLOCK_SIZE
from router.client import MoeClient
from router.local import LocalMoe
from router.tensor_shapes import gate_tensor_shapes

_SMOKE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
}
HEAD_GAIN = 3.0
"""Logits of a few units: greedy choices that rounding seldom turns."""


def lite_config(*, smoke: bool, num_layers: int | None = None) -> ModelConfig:
    """V2-Lite; smoke: the same kind of model, tiny."""
    raw = PRESETS["v2-lite"] | _SMOKE if smoke else dict(KNOWN["v2-lite"])
    return ModelConfig.parse(raw | ({"num_hidden_layers": num_layers} if num_layers else {}))


class SeededCheckpoint:
    """Tensors by name: each from its own seed, the CRC of the name, the same in every process."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config = config
        self._device = device
        self._shapes = {
            **attention_tensor_shapes(config),
            **gate_tensor_shapes(config),
            **expert_tensor_shapes(config),
        }

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Whether it has all of these."""
        missing = {name for name, shape in shapes.items() if self._shapes.get(name) != shape}
        if missing:
            raise ValueError(f"the seeded model lacks {sorted(missing)[:3]}")

    def tensor(self, name: str) -> Tensor:
        """bfloat16 on the device, complete when this returns: a loader copies on a stream of its
        own."""
        shape = self._shapes[name]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(
            shape, dtype=torch.bfloat16, device=self._device, generator=generator
        ).mul_(_std(name, shape))
        if name.endswith("norm.weight"):
            values += 1.0
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return values

    def weight(self, name: str) -> Weight:
        """A matrix."""
        return Weight(self.tensor(name))


def _std(name: str, shape: tuple[int, ...]) -> float:
    """Every sub-layer's output is near 1."""
    if name.endswith("norm.weight"):
        return 0.1
    if name == "model.embed_tokens.weight":
        return 1.0
    gain = HEAD_GAIN if name == "lm_head.weight" else 1.0
    return float(gain * shape[1] ** -0.5)


@dataclass(frozen=True)
class Model:
    """All weights on one device, with the routed experts in the same process."""

    config: ModelConfig
    compute: ComputeDevice
    weights: DeviceModelWeights
    moe: LocalMoe
    checkpoint: SeededCheckpoint

    @classmethod
    def open(cls, config: ModelConfig, compute: ComputeDevice) -> Model:
        """Makes every tensor."""
        checkpoint = SeededCheckpoint(config, compute.device)
        weights = load_device_weights(checkpoint, compute)
        moe = LocalMoe.open(checkpoint, compute)
        return cls(config, compute, weights, moe, checkpoint)

    def new_cache(self, num_sequences: int, num_tokens: int) -> Tensor:
        """For sequences of up to num_tokens each."""
        config = self.config
        layout = CacheLayout(config.kv_lora_rank, config.qk_rope_head_dim, self.compute.dtype)
        num_blocks = num_sequences * -(-num_tokens // BLOCK_SIZE)
        return layout.new_cache(
            config.num_hidden_layers, num_blocks, BLOCK_SIZE, self.compute.device
        )

    def decoder(
        self,
        cache: Tensor,
        num_sequences: int,
        num_tokens: int,
        *,
        graphs: bool,
        moe: MoeClient | None = None,
    ) -> DeviceDecoder:
        """Over a cache from `new_cache` of the same numbers. moe: instead of its own."""
        return DeviceDecoder(
            self.config,
            self.weights,
            moe or self.moe,
            cache,
            self.compute,
            max_model_len=-(-num_tokens // BLOCK_SIZE) * BLOCK_SIZE,
            max_num_seqs=num_sequences,
            use_graphs=graphs,
        )
