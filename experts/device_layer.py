"""Gated MLPs on a device: what experts/layer.py does with mapped weights, with copies of them.

`DeviceSlots` is the pool of a worker: one tensor for all slots, so that a kernel finds an expert by
the number of its slot. `DeviceMlp` is the dense FFN and the shared experts. Weights keep the form
of the checkpoint: fp8 stays fp8 with its scales, others take the dtype of the device's activations.
Nothing below waits for the device, except the filling of a slot.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from experts.device import ComputeDevice
from experts.kernels.gpu.grouped_gemm import DeviceWeights, block_rows_for
from experts.kernels.gpu.ops import ExpertOps
from experts.layer import ExpertWeights
from experts.linear import Weight
from experts.tensor_files import SCALE_BLOCK


@dataclass(frozen=True, eq=False)
class DeviceWeight:
    """data [out, in] on the device; with float8_e4m3fn also scales [ceil(out/128), ceil(in/128)]
    float32. fp8_matmul: products take fp8 activations too."""

    data: Tensor
    scales: Tensor | None = None
    fp8_matmul: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        out, length = self.data.shape
        return out, length

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def to_device_weight(weight: Weight, device: ComputeDevice) -> DeviceWeight:
    """A copy of a host weight: fp8 as it is, others in the device's dtype."""
    if weight.scale_inv is None:
        return DeviceWeight(weight.data.to(device.device, device.dtype))
    return DeviceWeight(
        weight.data.to(device.device), weight.scale_inv.to(device.device), device.fp8_matmul
    )


def linear_device(
    x: Tensor,
    weight: DeviceWeight,
    *,
    ops: ExpertOps,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> Tensor:
    """x [T, in] -> [T, out] in out_dtype (that of x if not given)."""
    return ops.linear(
        x,
        weight.data,
        weight.scales,
        out_dtype=out_dtype,
        deterministic=deterministic,
        fp8_matmul=weight.fp8_matmul,
    )


class DeviceSlots:
    """The experts that a worker holds, by slot, in the memory of its device.

    Filling a slot while another thread computes over other slots is safe; emptying or replacing
    a slot that a running call uses (on the device: one whose results have not arrived) is for the
    caller to prevent.
    """

    def __init__(
        self,
        num_slots: int,
        width: int,
        hidden_size: int,
        weight_dtype: torch.dtype,
        device: ComputeDevice,
    ) -> None:
        """width: f, hidden_size: d; weight_dtype: of the checkpoint's experts."""
        self.num_slots, self.weight_dtype, self.device = num_slots, weight_dtype, device
        self.shape = (width, hidden_size)
        self.weights = _empty_slots(num_slots, width, hidden_size, weight_dtype, device)
        self._upload = _Upload(device)

    @property
    def hidden_size(self) -> int:
        return self.shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self.weights))

    def fill(self, slot: int, expert: ExpertWeights) -> None:
        """Copy an expert into a slot; when this returns, kernels launched later see it.

        Raises ValueError when shape or dtype are not the pool's, or there is no such slot.
        """
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot {slot} of {self.num_slots}")
        if expert.kind != (self.shape, self.weight_dtype):
            raise ValueError(
                f"slot {slot}: {expert.kind}, the pool holds {(self.shape, self.weight_dtype)}"
            )
        weights = self.weights
        copies = [
            (weights.gate_up[slot, 0], expert.gate.data),
            (weights.gate_up[slot, 1], expert.up.data),
            (weights.down[slot], expert.down.data),
        ]
        if weights.gate_up_scales is not None and weights.down_scales is not None:
            copies += [
                (weights.gate_up_scales[slot, 0], _scales(expert.gate)),
                (weights.gate_up_scales[slot, 1], _scales(expert.up)),
                (weights.down_scales[slot], _scales(expert.down)),
            ]
        self._upload.copy(copies)

    def clear(self, slot: int) -> None:
        """Nothing to do: a slot that no table names is not read."""


def _empty_slots(
    num_slots: int, width: int, hidden: int, weight_dtype: torch.dtype, device: ComputeDevice
) -> DeviceWeights:
    is_fp8 = weight_dtype == torch.float8_e4m3fn
    dtype = weight_dtype if is_fp8 else device.dtype
    gate_up = torch.empty(num_slots, 2, width, hidden, dtype=dtype, device=device.device)
    down = torch.empty(num_slots, hidden, width, dtype=dtype, device=device.device)
    if not is_fp8:
        return DeviceWeights(gate_up, down)
    rows, columns = -(-width // SCALE_BLOCK), -(-hidden // SCALE_BLOCK)
    return DeviceWeights(
        gate_up,
        down,
        torch.empty(num_slots, 2, rows, columns, device=device.device),
        torch.empty(num_slots, columns, rows, device=device.device),
    )


def _scales(weight: Weight) -> Tensor:
    if weight.scale_inv is None:
        raise ValueError("an fp8 weight without scales")
    return weight.scale_inv


def _tensors(weights: DeviceWeights) -> list[Tensor]:
    all_four = (weights.gate_up, weights.down, weights.gate_up_scales, weights.down_scales)
    return [tensor for tensor in all_four if tensor is not None]


class _Upload:
    """Copies from the host. To a GPU they go through one pinned buffer and a stream of their own,
    so that kernels of other threads run on meanwhile."""

    def __init__(self, device: ComputeDevice) -> None:
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        if device.is_cuda:
            self._stream = torch.cuda.Stream(device.device)  # type: ignore[no-untyped-call]
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def copy(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        """(target, source) pairs; dtypes may differ. Returns when all are in place."""
        if self._stream is None:
            for target, source in copies:
                target.copy_(source)
            return
        with self._lock, torch.cuda.stream(self._stream):
            for (target, source), staged in zip(copies, self._staged(copies), strict=True):
                staged.copy_(source)
                target.copy_(staged, non_blocking=True)
            self._stream.synchronize()

    def _staged(self, copies: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        sources = [source for _, source in copies]
        num_bytes = sum(_aligned(source.nbytes) for source in sources)
        if self._pinned.nbytes < num_bytes:
            self._pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return views_like(self._pinned, sources)


def views_like(buffer: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Parts of a buffer of bytes in the shapes and dtypes of these tensors, each aligned."""
    views, start = [], 0
    for tensor in tensors:
        part = buffer[start : start + tensor.nbytes]
        views.append(part.view(tensor.dtype).view(tensor.shape))
        start += _aligned(tensor.nbytes)
    return views


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def grouped_swiglu_device(
    x: Tensor,
    slots: DeviceSlots,
    expert_ids: Tensor,
    slot_of: Tensor,
    row_ids: Tensor,
    row_starts: Tensor,
    pair_weights: Tensor,
    *,
    ops: ExpertOps,
    per_pair: bool = False,
    deterministic: bool = False,
    num_here: int | None = None,
) -> Tensor:
    """The routed experts of one layer; no wait for the device, sizes only from shapes.

    x [T, d] in the device's dtype; pairs lie by row, a row's by ascending expert id: expert_ids [P]
    int32 (outside of 0..E-1: the pair is dropped), row_ids [P] int32 < T, pair_weights [P] float32,
    row_starts [T + 1] int32. slot_of [E] int32: slot of each expert of this layer, -1: not here,
    its pairs are dropped. Returns [T, d] float32: the sum of weight * expert(x[t]) over the pairs
    of row t in their order; with `per_pair` the weighted rows [P, d]; dropped pairs are zero.
    deterministic: a row's bits depend on its own pairs only. num_here: experts of this layer that
    have a slot, if known: how many rows each may expect decides the size of the kernels' blocks.
    """
    weights, dtype = slots.weights, x.dtype
    num_pairs, num_experts = expert_ids.shape[0], slot_of.shape[0]
    block_rows = block_rows_for(
        num_pairs, num_here or num_experts, weights.gate_up.dtype, deterministic=deterministic
    )
    pairs = ops.sort_pairs(expert_ids, num_experts, block_rows)
    quantised = weights.is_fp8 and slots.device.fp8_matmul
    rows, scales = ops.quantise_rows(x) if quantised else (x, None)
    h = ops.gate_up_silu(
        rows, scales, weights, slot_of, pairs, row_ids, out_dtype=dtype, deterministic=deterministic
    )
    h, scales = ops.quantise_rows(h) if quantised else (h, None)
    pair_rows = ops.down(
        h, scales, weights, slot_of, pairs, pair_weights, deterministic=deterministic
    )
    return pair_rows if per_pair else ops.sum_pairs(pair_rows, row_starts)


@dataclass(frozen=True, eq=False)
class DeviceMlp:
    """gate_up [2f', d] (gate above up), down [d, f']. f': the width f, with fp8 rounded up to whole
    blocks of scales by zeros."""

    gate_up: DeviceWeight
    down: DeviceWeight

    @classmethod
    def load(cls, expert: ExpertWeights, device: ComputeDevice) -> DeviceMlp:
        """A copy of a host MLP."""
        gate, up, down = (
            to_device_weight(weight, device) for weight in (expert.gate, expert.up, expert.down)
        )
        if gate.scales is None or up.scales is None:
            return cls(DeviceWeight(torch.cat([gate.data, up.data])), down)
        missing = -gate.shape[0] % SCALE_BLOCK
        rows = [_zero_rows(half.data, missing) for half in (gate, up)]
        return cls(
            DeviceWeight(torch.cat(rows), torch.cat([gate.scales, up.scales]), device.fp8_matmul),
            DeviceWeight(
                _zero_rows(down.data.t(), missing).t().contiguous(), down.scales, device.fp8_matmul
            ),
        )

    @property
    def num_bytes(self) -> int:
        return self.gate_up.num_bytes + self.down.num_bytes


def _zero_rows(data: Tensor, count: int) -> Tensor:
    """data with `count` rows of zeros below; fp8 as bytes, 0 is 0.0."""
    return pad(data.view(torch.uint8), (0, 0, 0, count)).view(data.dtype)


def swiglu_device(
    x: Tensor, mlp: DeviceMlp, *, ops: ExpertOps, deterministic: bool = False
) -> Tensor:
    """The dense FFN and the shared experts: x [T, d] -> [T, d] in the dtype of x."""
    gate_up = linear_device(x, mlp.gate_up, ops=ops, deterministic=deterministic)
    return linear_device(ops.silu_mul(gate_up), mlp.down, ops=ops, deterministic=deterministic)
