"""Decoders on a device that is played by the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attention.device_model import DeviceDecoder
from attention.device_weights import load_device_weights
from attention.kernels.gpu.cache_layout import CacheLayout
from experts.device import ComputeDevice
from router.client import MoeClient
from tests.attention.harness import BLOCK_SIZE, Rig
from tests.reference import Reference

TWINS = ComputeDevice(torch.device("cpu"), torch.float32, "torch", "test")
TWINS_BF16 = ComputeDevice(torch.device("cpu"), torch.bfloat16, "torch", "test")
KERNELS = ComputeDevice(torch.device("cpu"), torch.float32, "triton", "test")
NUM_BLOCKS = 128


def device_model(
    rig: Rig,
    device: ComputeDevice = TWINS,
    moe: MoeClient | None = None,
    cache_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    **settings: Any,
) -> DeviceDecoder:
    """moe: the router of the rig's pool if not given; settings: of DeviceDecoder."""
    config = rig.config
    layout = CacheLayout(config.kv_lora_rank, config.qk_rope_head_dim, cache_dtype or device.dtype)
    cache = layout.new_cache(config.num_hidden_layers, NUM_BLOCKS, BLOCK_SIZE, device.device)
    return DeviceDecoder(
        config,
        load_device_weights(rig.checkpoint, device),
        moe or rig.pool.router(deterministic=deterministic),
        cache.fill_(255 if cache.dtype == torch.uint8 else torch.nan),  # poison
        device,
        deterministic=deterministic,
        **({"max_model_len": NUM_BLOCKS * BLOCK_SIZE, "max_num_seqs": 8} | settings),
    )


class ForcedRoutes:
    """The routed experts of a checkpoint; tokens go where `routes` says, not the gate:
    rounding to bfloat16 would turn 6 to 15 % of the choices of a random model."""

    accepts_device = True
    num_renormalised = 0

    def __init__(
        self, rig: Rig, routes: dict[int, Tensor], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """routes: layer -> expert ids [T, k] of the only step there will be."""
        self._routes = routes
        self._gates = Reference(rig.folder)
        self._experts = Reference(rig.folder, dtype)

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Tensor:
        prefix = f"model.layers.{layer}.mlp"
        ids, weights = self._gates._gate(f"{prefix}.gate", x.float(), self._routes[layer])
        y = torch.zeros(x.shape)
        for expert in ids.unique().tolist():
            rows, places = (ids == expert).nonzero(as_tuple=True)
            out = self._experts._mlp(f"{prefix}.experts.{expert}", x[rows])
            y.index_add_(0, rows, out.float() * weights[rows, places, None])
        return y

    def finish(self, ticket: Tensor) -> Tensor:
        return ticket
