"""All routed experts of a model in one process on one device: a MoE layer without a hop.

    ids, weights = select(x Wg^T)              the gate, router/kernels/gpu/gate.py
    y[t]         = sum of weights[t, j] * expert ids[t, j] (x[t])      experts/device_layer.py

Sizes come from shapes only and nothing waits for the device, so `begin` and `finish` may be part of
a captured CUDA graph. For one GPU that holds the whole model, and to measure what the tiers cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

import torch
from torch import Tensor

from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from experts.device_layer import DeviceSlots, grouped_swiglu_device
from experts.kernels.gpu.ops import expert_ops
from experts.weights import load_expert
from router.errors import NonFiniteInput
from router.gate import DeviceGate, GateSpec
from router.kernels.gpu.ops import router_ops
from router.times import HopTimes, LayerHop
from router.weights import load_device_gates

MAX_ROWS: Final = 16_384
_NONE: Final = 2**31 - 1


class LocalMoe:
    """A MoeClient. One thread at a time uses it, on the stream that computes the rest."""

    accepts_device: Final = True
    """x and the result lie on the device."""
    capturable: Final = True
    """`begin` and `finish` only queue kernels; `check` tells what they would raise."""
    num_renormalised: Final = 0
    hop_times: Final = HopTimes()
    """There are no hops, and what the experts compute cannot be told from the rest."""

    def __init__(
        self,
        gates: Mapping[int, DeviceGate],
        spec: GateSpec,
        slots: DeviceSlots,
        slot_of: Mapping[int, Tensor],
        *,
        deterministic: bool = False,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """slot_of: layer -> [E] int32 on the device, the slot of each of its experts. max_rows: of
        one batch."""
        kernels = slots.device.kernels
        self._router = router_ops("triton" if kernels == "triton" else "torch")
        self._experts = expert_ops(kernels)
        self._gates = gates
        self._spec = spec
        self._slots = slots
        self._slot_of = slot_of
        self._deterministic = deterministic
        self._max_rows = max_rows
        on_device, top_k = slots.device.device, spec.top_k
        # row p // k of each pair p, and where the pairs of each row begin; a batch takes the front
        self._row_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=on_device) * top_k
        self._row_ids = torch.arange(max_rows * top_k, dtype=torch.int32, device=on_device) // top_k
        self._first_bad_row = torch.full((1,), _NONE, dtype=torch.int32, device=on_device)

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        device: ComputeDevice,
        *,
        deterministic: bool = False,
        max_rows: int = MAX_ROWS,
    ) -> Self:
        """Copies every gate and routed expert to the device. Raises CheckpointError."""
        config = checkpoint.config
        layers, num_experts = config.moe_layers, config.n_routed_experts
        shape, dtype = load_expert(checkpoint, layers[0], 0).kind
        slots = DeviceSlots(len(layers) * num_experts, *shape, dtype, device)
        numbers = torch.arange(slots.num_slots, dtype=torch.int32, device=device.device)
        for i, layer in enumerate(layers):
            for expert in range(num_experts):
                slots.fill(i * num_experts + expert, load_expert(checkpoint, layer, expert))
        return cls(
            load_device_gates(checkpoint, device),
            GateSpec.of(config),
            slots,
            dict(zip(layers, numbers.view(-1, num_experts).unbind(), strict=True)),
            deterministic=deterministic,
            max_rows=max_rows,
        )

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Tensor:
        """Queue the layer for x [T, d] in the device's dtype; there is nothing to wait for, so a
        deadline has no effect. Raises ValueError for more than max_rows rows."""
        num_rows, gate = x.shape[0], self._gates[layer]
        if num_rows > self._max_rows:
            raise ValueError(f"{num_rows} rows, this client was made for {self._max_rows}")
        logits = self._router.gate_logits(x, gate.weight)
        topk_ids, topk_weights, bad_row = self._router.select_experts(logits, gate.bias, self._spec)
        self._note(bad_row, num_rows)
        return grouped_swiglu_device(
            x,
            self._slots,
            topk_ids.view(-1),
            self._slot_of[layer],
            self._row_ids[: topk_ids.numel()],
            self._row_starts[: num_rows + 1],
            topk_weights.view(-1),
            ops=self._experts,
            deterministic=self._deterministic,
        )

    def finish(self, ticket: Tensor) -> Tensor:
        """The routed experts' output, [T, d] float32 on the device."""
        return ticket

    def log_hops(self, log: list[LayerHop] | None) -> None:
        """There are none."""

    def forget(self) -> None:
        """Forget the rows that were not finite so far. Does not wait for the device."""
        self._first_bad_row.fill_(_NONE)

    def check(self, num_rows: int) -> None:
        """Raise NonFiniteInput if one of the first `num_rows` rows (those behind are padding) was
        not finite in any layer since the last `forget`. Waits for the device."""
        row = int(self._first_bad_row)
        if row < num_rows:
            raise NonFiniteInput(row)

    def _note(self, bad_row: Tensor, num_rows: int) -> None:
        """bad_row [1] int32: the first row that is not finite, num_rows if there is none."""
        found = torch.where(bad_row < num_rows, bad_row, _NONE)
        torch.minimum(self._first_bad_row, found, out=self._first_bad_row)
