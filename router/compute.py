"""What a router computes with rows: gate, rows for each worker, sums; on the CPU or on a device.

What goes where is decided elsewhere (dispatch.py, lane.py) from the arrays that `choose` returns.
Several threads may use one `RouterCompute`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from experts.channel.memory import ChannelMemory
from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from router.combine import sum_by_expert, sum_by_worker
from router.compiled import compile_kernels
from router.dispatch import Float32s, Int64s, Share
from router.gate import GateSpec, GateWeights, choose
from router.weights import load_gates

Answer = tuple[Int64s, Tensor]
"""Places in a micro-batch, ascending, and the answer's row for each of them."""
Stays = Callable[[Share], bool]
"""Whether the connection to a share's worker takes rows on the device."""


class RouterCompute(Protocol):
    """x is always [T, d], float32 or bfloat16, T > 0."""

    spec: GateSpec
    layers: Collection[int]
    """Those with experts."""
    width: int
    memory: ChannelMemory
    """Where answers to rows that lie where it computes may land."""
    accepts_device: bool
    """x may lie on the device; sums then do too."""

    def choose(self, layer: int, x: Tensor) -> tuple[Int64s, Float32s]:
        """ids [T, k], ascending in each row, and weights [T, k]. Raises NonFiniteInput."""

    def pick(self, x: Tensor, shares: Sequence[Share], stays: Stays) -> Iterable[Tensor]:
        """The rows of x for each share as its channel takes them: contiguous, in the dtype of x, on
        the host. Where x lies on the device, the rows of a share that `stays` do too."""

    def sum_by_worker(self, x: Tensor, answers: Sequence[Answer]) -> Tensor:
        """Answers by ascending worker id, at most k for a row -> [T, d] float32, where x lies; zero
        for a row without any."""

    def sum_by_expert(self, x: Tensor, answers: Sequence[Answer]) -> Tensor:
        """Places are row * k + rank by expert id; answers in any order, each place at most once ->
        the sum of each row by rank, [T, d] float32, where x lies."""

    def scale_rows(self, total: Tensor, rows: Int64s, scales: Float32s) -> None:
        """total[rows] *= scales, in place."""

    def warm_up(self) -> None:
        """Compile what the first token would wait for."""


class HostRows:
    """The part of a RouterCompute that is done with rows on the host."""

    def __init__(self, spec: GateSpec, width: int, layers: Collection[int]) -> None:
        self.spec = spec
        self.width = width
        self.layers = layers

    def pick(self, x: Tensor, shares: Sequence[Share], stays: Stays) -> Iterable[Tensor]:
        """See RouterCompute. Each is copied when it is asked for: the first worker computes
        meanwhile."""
        for share in shares:
            whole = share.row_index.shape[0] == x.shape[0]
            yield x if whole else x.index_select(0, torch.from_numpy(share.row_index))

    def sum_by_worker(self, x: Tensor, answers: Sequence[Answer]) -> Tensor:
        num_rows, width = x.shape
        return sum_by_worker(
            (num_rows, width),
            [
                (torch.from_numpy(index) if index.size < num_rows else None, rows)
                for index, rows in answers
            ],
        )

    def sum_by_expert(self, x: Tensor, answers: Sequence[Answer]) -> Tensor:
        num_rows, width = x.shape
        by_pair = [(torch.from_numpy(index), rows) for index, rows in answers]
        return sum_by_expert((num_rows, width), self.spec.top_k, by_pair)

    def scale_rows(self, total: Tensor, rows: Int64s, scales: Float32s) -> None:
        total[torch.from_numpy(rows)] *= torch.from_numpy(scales).unsqueeze(1)


class HostCompute(HostRows):
    """The CPU kernels."""

    accepts_device = False
    memory = ChannelMemory()

    def __init__(self, gates: Mapping[int, GateWeights], spec: GateSpec) -> None:
        super().__init__(spec, next(iter(gates.values())).weight.shape[1], gates.keys())
        self._gates = gates

    def choose(self, layer: int, x: Tensor) -> tuple[Int64s, Float32s]:
        return choose(x, self._gates[layer], self.spec)

    def warm_up(self) -> None:
        compile_kernels()


def open_compute(checkpoint: Checkpoint, device: ComputeDevice) -> RouterCompute:
    """The gates of a checkpoint. Raises CheckpointError."""
    if device.is_host:
        return HostCompute(load_gates(checkpoint), GateSpec.of(checkpoint.config))
    from router.device_compute import DeviceCompute  # a CPU router needs no GPU kernels

    return DeviceCompute.open(checkpoint, device)
