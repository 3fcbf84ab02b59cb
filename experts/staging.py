"""Copies between the memory of a device and pinned host memory, beside what the device computes.

Pinned memory is what a GPU copies from and to by itself, at the full rate of its bus and without
the host waiting; allocating it takes milliseconds. Buffers therefore come from torch's caching
allocator of pinned memory and go back to it when the last view of one is gone and the copies that
use it have ended (CUDA C++ Programming Guide, 3.2.6.1 "Concurrent Data Transfers"). So:

- Lifetimes: a tensor from here is the holder's as long as it is held. While one buffer is still
  being read (a frame under way, a second micro-batch) the next copy gets another: two alternate
  in a steady loop, and nothing is overwritten because somebody was slow.
- Threads: any number may share a Staging, its only state is two streams. Copies of one direction
  run one after another: a thread with a Staging of its own waits for no other's.
- Streams: each copy starts after what the calling thread has queued on its current stream. What
  comes to the device can be used on that stream at once; what goes to the host after `wait()`.

On the CPU every function returns what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from experts.channel.memory import ChannelMemory
from experts.device import ComputeDevice

ALIGN_BYTES = 256
"""Where the parts of a packed copy begin: vector loads and torch's own allocations."""


class HostCopy(Protocol):
    """A copy on its way to the host."""

    def wait(self) -> Tensor:
        """The host's tensor, once all of it is there. May be called again."""


class _Ready:
    """What was on the host already."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


class _UnderWay:
    def __init__(self, tensor: Tensor, arrived: torch.cuda.Event) -> None:
        self._tensor = tensor
        self._arrived = arrived

    def wait(self) -> Tensor:
        self._arrived.synchronize()
        return self._tensor


class Staging:
    """Ways to and from the host for one device."""

    def __init__(self, device: ComputeDevice) -> None:
        self._device = device.device
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.is_cuda:  # a queue for each direction: neither waits for the other's data
            self._streams = _new_stream(self._device), _new_stream(self._device)

    def to_host(self, x: Tensor) -> HostCopy:
        """Begin to copy x. Its memory must not be overwritten before `wait` has returned, freeing
        it is safe. The copy is contiguous."""
        if self._streams is None or not x.is_cuda:
            return _Ready(x)
        stream = self._streams[0]
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        x = x.contiguous()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
            x.record_stream(stream)
            arrived = stream.record_event()
        return _UnderWay(host, arrived)

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same tensors on the device, by one copy. Those that lie there stay what they are.

        The given memory is read before this returns.
        """
        if self._streams is None:
            return tensors
        moving = [tensor for tensor in tensors if not tensor.is_cuda]
        if not moving:
            return tensors
        arrived = iter(self._upload(moving, self._streams[1]))
        return tuple(tensor if tensor.is_cuda else next(arrived) for tensor in tensors)

    def _upload(self, tensors: Sequence[Tensor], stream: torch.cuda.Stream) -> list[Tensor]:
        starts, num_bytes = layout(tensors)
        host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        for place, tensor in zip(views(host, tensors, starts), tensors, strict=True):
            place.copy_(tensor)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(stream):  # memory of this stream's pool: no wait for `current`
            packed = host.to(self._device, non_blocking=True)
        packed.record_stream(current)
        current.wait_stream(stream)
        return views(packed, tensors, starts)


def channel_memory(device: ComputeDevice) -> ChannelMemory:
    """Where rows land that a peer puts there: on the device of who computes with them."""
    return ChannelMemory(device=device.device if device.is_cuda else None)


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def layout(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins in a packed buffer, in bytes, and the size of the buffer."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGN_BYTES) * ALIGN_BYTES
    return starts, end


def views(packed: Tensor, like: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    """The tensors of a packed buffer [bytes] uint8: shapes and dtypes of `like`, contiguous."""
    return [
        packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(like, starts, strict=True)
    ]
