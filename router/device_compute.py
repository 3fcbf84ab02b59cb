"""A router's gate, packing and sums on a device; only ids, weights and picked rows come down.

Rows that lie on the device (an attention worker in the same process, a channel between devices) are
picked there for all workers in one pass. For those whose channel takes them they stay there, for
the others they come down in one copy: the bus carries what is sent and the host copies nothing. The
answers, wherever they lie, are summed there. Of rows that lie on the host only the gate's copy goes
up: they are sent from where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from experts.staging import Staging, channel_memory
from router.compiled import compile_kernels
from router.compute import Answer, HostRows, Stays
from router.dispatch import Float32s, Int32s, Int64s, Share
from router.errors import NonFiniteInput
from router.gate import DeviceGate, GateSpec
from router.kernels.gpu.gate import PARALLEL_ROWS
from router.kernels.gpu.ops import router_ops
from router.weights import load_device_gates

WARM_UP_ROWS = (1, PARALLEL_ROWS, PARALLEL_ROWS + 1)
"""Batches for each of which the kernels are compiled anew."""


class DeviceCompute(HostRows):
    """See router.compute.RouterCompute."""

    accepts_device = True

    def __init__(
        self, gates: Mapping[int, DeviceGate], spec: GateSpec, device: ComputeDevice
    ) -> None:
        super().__init__(spec, next(iter(gates.values())).weight.shape[1], gates.keys())
        self._gates = gates
        self.memory = channel_memory(device)
        self._device = device
        self._ops = router_ops("triton" if device.kernels == "triton" else "torch")
        self._staging = Staging(device)

    @classmethod
    def open(cls, checkpoint: Checkpoint, device: ComputeDevice) -> Self:
        """Copies the gates to the device. Raises CheckpointError."""
        gates = load_device_gates(checkpoint, device)
        return cls(gates, GateSpec.of(checkpoint.config), device)

    def choose(self, layer: int, x: Tensor) -> tuple[Int64s, Float32s]:
        gate = self._gates[layer]
        (rows,) = self._staging.to_device(x)
        logits = self._ops.gate_logits(rows, gate.weight)
        chosen = self._ops.select_experts(logits, gate.bias, self.spec)
        numbers = torch.cat([tensor.view(torch.int32).flatten() for tensor in chosen])
        on_host = self._staging.to_host(numbers).wait()
        *pairs, bad_row = on_host.split_with_sizes([tensor.numel() for tensor in chosen])
        if int(bad_row) < x.shape[0]:
            raise NonFiniteInput(int(bad_row))
        ids, weights = (part.view(x.shape[0], -1).numpy() for part in pairs)
        return ids.astype(np.int64), weights.view(np.float32)

    def pick(self, x: Tensor, shares: Sequence[Share], stays: Stays) -> Iterable[Tensor]:
        if not shares or not self._is_here(x):
            return super().pick(x, shares, stays)
        stay = [stays(share) for share in shares]
        kept = [share.row_index for share, here in zip(shares, stay, strict=True) if here]
        moved = [share.row_index for share, here in zip(shares, stay, strict=True) if not here]
        packed = self._pack(x, kept + moved)
        num_kept = sum(map(len, kept))
        on_device = _cut(packed[:num_kept], kept)
        on_host = _cut(self._to_host(packed[num_kept:]), moved)
        return [next(on_device if here else on_host) for here in stay]

    def _pack(self, x: Tensor, indices: Sequence[Int64s]) -> Tensor:
        """Those rows of x, one below the other, in memory of their own."""
        index = torch.from_numpy(np.concatenate(indices).astype(np.int32))
        return self._ops.pack_rows(x, *self._staging.to_device(index))

    def _to_host(self, rows: Tensor) -> Tensor:
        return self._staging.to_host(rows).wait() if rows.shape[0] else rows

    def sum_by_worker(self, x: Tensor, answers: Sequence[Answer]) -> Tensor:
        if not self._is_here(x):
            return super().sum_by_worker(x, answers)
        return self._combine(x, answers, places_by_row(x.shape[0], self.spec.top_k, answers))

    def sum_by_expert(self, x: Tensor, answers: Sequence[Answer]) -> Tensor:
        if not self._is_here(x):
            return super().sum_by_expert(x, answers)
        return self._combine(x, answers, places_by_pair(x.shape[0], self.spec.top_k, answers))

    def scale_rows(self, total: Tensor, rows: Int64s, scales: Float32s) -> None:
        if not self._is_here(total):
            return super().scale_rows(total, rows, scales)
        index, factors = self._staging.to_device(torch.from_numpy(rows), torch.from_numpy(scales))
        total[index] *= factors.unsqueeze(1)
        return None

    def warm_up(self) -> None:
        compile_kernels()
        if not self._device.is_cuda:
            return
        layer = next(iter(self._gates))
        for num_rows in WARM_UP_ROWS:
            x = torch.zeros(
                num_rows, self.width, dtype=self._device.dtype, device=self._device.device
            )
            self.choose(layer, x)
            rows = np.arange(num_rows)
            self.sum_by_worker(x, [(rows, self._to_host(self._pack(x, [rows])))])

    def _is_here(self, x: Tensor) -> bool:
        return x.device == self._device.device

    def _combine(self, x: Tensor, answers: Sequence[Answer], places: Int32s) -> Tensor:
        """places [T, k]: which rows of the answers, one below the other, make up each sum."""
        if not answers:
            return torch.zeros(x.shape, device=x.device)
        index, *rows = self._staging.to_device(
            torch.from_numpy(places), *(rows for _, rows in answers)
        )
        return self._ops.combine_rows(rows[0] if len(rows) == 1 else torch.cat(rows), index)


def _cut(rows: Tensor, indices: Sequence[Int64s]) -> Iterator[Tensor]:
    """The rows of one index after the other."""
    return iter(rows.split_with_sizes([index.size for index in indices]))


def places_by_row(num_rows: int, top_k: int, answers: Sequence[Answer]) -> Int32s:
    """[T, k]: where the rows for row t lie among all answers' rows, in the order of the answers;
    -1 fills up."""
    places = np.full((num_rows, top_k), -1, np.int32)
    num_found = np.zeros(num_rows, np.int32)
    start = 0
    for index, rows in answers:
        places[index, num_found[index]] = np.arange(start, start + rows.shape[0])
        num_found[index] += 1
        start += rows.shape[0]
    return places


def places_by_pair(num_rows: int, top_k: int, answers: Sequence[Answer]) -> Int32s:
    """[T, k]: where the row for each pair lies among all answers' rows; -1: nobody answered it."""
    places = np.full(num_rows * top_k, -1, np.int32)
    start = 0
    for index, rows in answers:
        places[index] = np.arange(start, start + rows.shape[0])
        start += rows.shape[0]
    return places.reshape(num_rows, top_k)
