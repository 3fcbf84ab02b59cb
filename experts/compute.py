"""How an expert worker computes: on the CPU over mapped weights, or on a device over its slots.

A worker (worker.py) decides which expert lies in which slot and which batches go together; a
`Compute` keeps the weights and computes. One thread at a time calls `run`; `fill` may run beside
it for a slot that no batch names yet, `clear` may not run beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from experts.kernels.runtime import warm_up
from experts.layer import ExpertWeights, SlotWeights, grouped_swiglu
from experts.placement.space import ExpertKey


class PairBatch(NamedTuple):
    """Rows of one layer and the pairs (row, expert, weight) to compute of them.

    rows [T, d] float32, bfloat16 or float8_e4m3fn, on the host or on the device of the `Compute`;
    row_ids, expert_ids, slot_ids [P] int32 and weights [P] float32, on the host.
    """

    layer: int
    rows: Tensor
    row_ids: Tensor
    expert_ids: Tensor
    slot_ids: Tensor
    weights: Tensor
    per_pair: bool  # one row a pair in their order, with fixed bits; else one summed row a row


def merge(batches: Sequence[PairBatch]) -> PairBatch:
    """Batches of one kind as one; their row_ids already count on from one to the next."""
    layers, rows, row_ids, expert_ids, slot_ids, weights, per_pair = zip(*batches, strict=True)
    return PairBatch(
        layers[0],
        torch.cat(rows),
        torch.cat(row_ids),
        torch.cat(expert_ids),
        torch.cat(slot_ids),
        torch.cat(weights),
        per_pair[0],
    )


class Compute(Protocol):
    """Where a worker's experts lie and are computed."""

    def fill(self, key: ExpertKey, slot: int, expert: ExpertWeights) -> None:
        """Put an expert in an empty slot; when this returns, batches may name it."""

    def clear(self, key: ExpertKey, slot: int) -> None:
        """Empty the slot of an expert that no batch names any more."""

    def run(self, batch: PairBatch) -> Tensor:
        """The weighted rows, summed in float32, in the dtype and the place of `rows`: [T, d], or
        [P, d] if `per_pair`. They are there when this returns."""

    def warm_up(self) -> None:
        """Compile what the first batch would wait for."""


class HostCompute:
    """The CPU kernels; a slot is a reference to the mapped weights."""

    def __init__(self, num_slots: int) -> None:
        self._slots = SlotWeights(num_slots)

    def fill(self, key: ExpertKey, slot: int, expert: ExpertWeights) -> None:
        self._slots.fill(slot, expert)

    def clear(self, key: ExpertKey, slot: int) -> None:
        self._slots.clear(slot)

    def run(self, batch: PairBatch) -> Tensor:
        return grouped_swiglu(
            batch.rows.float(),
            self._slots,
            batch.row_ids,
            batch.slot_ids,
            batch.weights,
            per_pair=batch.per_pair,
            deterministic=batch.per_pair,
        ).to(batch.rows.dtype)

    def warm_up(self) -> None:
        warm_up()


def open_compute(checkpoint: Checkpoint, num_slots: int, device: ComputeDevice) -> Compute:
    """For the experts of a checkpoint. On a device the memory of all slots is taken here."""
    if device.is_host:
        return HostCompute(num_slots)
    from experts.device_compute import DeviceCompute  # a CPU worker needs no GPU kernels

    return DeviceCompute.open(checkpoint, num_slots, device)
