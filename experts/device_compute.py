"""The experts of a worker on a device: rows up, grouped SwiGLU over the slots there, answer down.

What crosses the bus for a batch is its rows in the dtype of the wire and one packed copy of its
pairs; weights are read where they lie. Which slot an expert has is known twice: to the worker, who
decides what can be computed, and as a table [L, E] on the device, that the kernels read. Weights
come to a slot beside what is being computed; the table is written in the order of the stream that
all threads of a worker compute on, so that a batch sees all that was named before it.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import Tensor

from experts.checkpoint import Checkpoint
from experts.compute import PairBatch
from experts.device import ComputeDevice
from experts.device_layer import DeviceSlots, grouped_swiglu_device
from experts.kernels.gpu.ops import expert_ops
from experts.layer import ExpertWeights
from experts.placement.space import ExpertKey
from experts.staging import Staging
from experts.weights import load_expert

WARM_UP_ROWS = (16, 64, 128)
"""Pairs of one expert: the kernels are compiled for blocks of so many rows (block_rows_for)."""


class DeviceCompute:
    """See experts.compute.Compute."""

    def __init__(
        self, slots: DeviceSlots, layers: tuple[int, ...], num_experts: int, device: ComputeDevice
    ) -> None:
        self._slots = slots
        self._device = device
        self._ops = expert_ops(device.kernels)
        self._staging = Staging(device)
        self._places = {layer: i for i, layer in enumerate(layers)}
        self._num_here = dict.fromkeys(layers, 0)
        self._slot_of = torch.full(
            (len(layers), num_experts), -1, dtype=torch.int32, device=device.device
        )

    @classmethod
    def open(cls, checkpoint: Checkpoint, num_slots: int, device: ComputeDevice) -> Self:
        """Takes the memory of the slots, all empty. Raises CheckpointError."""
        config = checkpoint.config
        shape, dtype = load_expert(checkpoint, config.moe_layers[0], 0).kind
        slots = DeviceSlots(num_slots, *shape, dtype, device)
        return cls(slots, config.moe_layers, config.n_routed_experts, device)

    # --- slots ---

    def fill(self, key: ExpertKey, slot: int, expert: ExpertWeights) -> None:
        self._slots.fill(slot, expert)
        self._name(key, slot)
        self._num_here[key[0]] += 1

    def clear(self, key: ExpertKey, slot: int) -> None:
        self._name(key, -1)
        self._num_here[key[0]] -= 1
        self._slots.clear(slot)

    def _name(self, key: ExpertKey, slot: int) -> None:
        layer, expert = key
        self._slot_of[self._places[layer], expert].fill_(slot)

    # --- batches ---

    def run(self, batch: PairBatch) -> Tensor:
        return self._run(batch, self._num_here[batch.layer])

    def _run(self, batch: PairBatch, num_here: int) -> Tensor:
        rows, *pairs = self._staging.to_device(batch.rows, *grouped_pairs(batch))
        row_ids, expert_ids, weights, row_starts = pairs
        result = grouped_swiglu_device(
            rows.to(self._device.dtype),
            self._slots,
            expert_ids,
            self._slot_of[self._places[batch.layer]],
            row_ids,
            row_starts,
            weights,
            ops=self._ops,
            per_pair=batch.per_pair,
            deterministic=batch.per_pair,
            num_here=num_here,
        ).to(rows.dtype)
        if batch.rows.is_cuda:
            torch.cuda.current_stream(self._device.device).synchronize()
            return result
        return self._staging.to_host(result).wait()

    def warm_up(self) -> None:
        """Pairs of an expert that does not exist, as if one were here: every kernel runs with every
        size of its blocks, no weights are read."""
        if not self._device.is_cuda:
            return
        layer, (_, width) = next(iter(self._places)), self._slots.shape
        for num_rows in WARM_UP_ROWS:
            nobody = torch.full((num_rows,), -1, dtype=torch.int32)
            rows = torch.zeros(num_rows, width, dtype=self._device.dtype)
            row_ids, weights = torch.arange(num_rows, dtype=torch.int32), torch.zeros(num_rows)
            for per_pair in (False, True):
                batch = PairBatch(layer, rows, row_ids, nobody, nobody, weights, per_pair)
                self._run(batch, num_here=1)


def grouped_pairs(batch: PairBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_ids, expert_ids, weights with the pairs of a row together (in the given order), and
    row_starts [T + 1]: where those of each row begin. With `per_pair` the order stays as it is."""
    row_ids = batch.row_ids.numpy()
    row_starts = np.zeros(batch.rows.shape[0] + 1, np.int32)
    np.cumsum(np.bincount(row_ids, minlength=batch.rows.shape[0]), out=row_starts[1:])
    starts = torch.from_numpy(row_starts)
    if batch.per_pair or bool((row_ids[:-1] <= row_ids[1:]).all()):
        return batch.row_ids, batch.expert_ids, batch.weights, starts
    order = torch.from_numpy(row_ids.argsort(kind="stable"))
    return batch.row_ids[order], batch.expert_ids[order], batch.weights[order], starts
