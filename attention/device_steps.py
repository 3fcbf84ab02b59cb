"""A step of a device as segments around its hops to the routed experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.device_batch import DeviceBatch
from attention.device_hop import Hop
from attention.graphs import Recorder, Segment
from experts.device import ComputeDevice


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What the segments of a step of T tokens read and write."""

    batch: DeviceBatch
    hidden: Tensor
    """[T, d] float32: the residual stream."""
    x: Tensor
    """[T, d] in the device's dtype: what the experts of a layer get."""
    routed: Tensor
    """[T, d] float32: what the routed ones of a layer answer."""

    @classmethod
    def new(cls, batch: DeviceBatch, hidden_size: int, device: ComputeDevice) -> Step:
        """Buffers for this batch; zeros, as rows of padding are computed with."""
        shape = batch.num_tokens, hidden_size
        return cls(
            batch,
            hidden=torch.zeros(shape, dtype=torch.float32, device=device.device),
            x=torch.zeros(shape, dtype=device.dtype, device=device.device),
            routed=torch.zeros(shape, dtype=torch.float32, device=device.device),
        )

    def first(self, num_rows: int) -> Step:
        """The same buffers, less the last rows; for absorbed tokens only."""
        batch = self.batch.first(num_rows)
        return Step(batch, self.hidden[:num_rows], self.x[:num_rows], self.routed[:num_rows])


@dataclass(frozen=True, slots=True)
class Program:
    """The segments of a step: `shared[i]` runs while the rows of layer `hops[i]` are with the
    routed experts, `between` before, between and after the hops."""

    hops: tuple[int, ...]
    between: tuple[Segment, ...]
    shared: tuple[Segment, ...]

    def play(self, step: Step, hop: Hop, wait_until_s: float | None) -> None:
        """Run all; of the rows of the buffers only those of `step` go to the experts."""
        for layer, between, shared in zip(self.hops, self.between, self.shared, strict=False):
            between()
            receive = hop.send(layer, step.x, wait_until_s)
            shared()
            step.routed.copy_(receive())
        self.between[-1]()

    def recorded(self, recorder: Recorder) -> Program:
        """The same with segments that are replayed. Runs them without the hops."""
        between, shared = [], []
        for index, segment in enumerate(self.between):
            between.append(recorder.record(segment).replay)
            if index < len(self.shared):
                shared.append(recorder.record(self.shared[index]).replay)
        return Program(self.hops, tuple(between), tuple(shared))
