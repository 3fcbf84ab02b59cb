"""Segments of a step that are recorded once and then replayed with one call.

A decode step launches some ten kernels a layer, each of a few microseconds: issued one by one,
Python is slower than the GPU. A *segment* is a function without arguments or result that reads and
writes static buffers only, always the same kernels over the same addresses; so it can be recorded
as a CUDA graph (CUDA C++ Programming Guide, 3.2.8.7 "CUDA Graphs"), one for each number of rows.
Steps are padded to the next number of rows that has graphs, its *bucket*.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import torch

from experts.device import ComputeDevice

Segment = Callable[[], None]


class Graph(Protocol):
    """A recorded segment."""

    def replay(self) -> None:
        """Do again what was recorded, with what the static buffers hold now."""


class Recorder(Protocol):
    """How segments of one device are recorded."""

    def record(self, segment: Segment) -> Graph:
        """Runs the segment at least once, so what the buffers hold at that time must be harmless:
        kernels are compiled and libraries opened outside the recording."""


class EagerGraph:
    """Calls the segment again: the graph of a device without graphs."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def replay(self) -> None:
        self._segment()


class EagerRecorder:
    """For the CPU: same buffers, same padding, no recording."""

    def record(self, segment: Segment) -> EagerGraph:
        segment()
        return EagerGraph(segment)


class CudaGraph:
    """A segment as one launch."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """Records on a stream of its own, all graphs with one pool of memory.

    Sharing is safe as graphs never run at the same time and nothing of a pool is read after the
    replay that wrote it: what segments leave for each other lies in static buffers. Other threads
    may go on using CUDA meanwhile (capture mode thread_local). torch.cuda.graph() is not used: it
    collects garbage before every capture, and a model has more than a thousand of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Of the 32 streams with priority: torch hands out those without again and again, and a copy
        # that another thread queues on the very stream would be recorded too.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, segment: Segment) -> CudaGraph:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            segment()
            self._stream.synchronize()
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                segment()
            except BaseException:
                with suppress(RuntimeError):  # that the capture is void: the reason is raised
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        return CudaGraph(graph)


def can_record(device: ComputeDevice) -> bool:
    """Not the plain-torch twins on a GPU: they read values back."""
    return not (device.is_cuda and device.kernels == "torch")


def open_recorder(device: torch.device) -> Recorder:
    """The recorder of a device."""
    return CudaRecorder(device) if device.type == "cuda" else EagerRecorder()


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, then 24, 32, 48, 64, 96, ...: powers of two and halfway between, so that from
    16 rows on a step grows by less than a half; the last is max_rows itself."""
    sizes, size = [], 1
    while size < max_rows:
        sizes.append(size)
        if size >= 16 and size * 3 // 2 < max_rows:
            sizes.append(size * 3 // 2)
        size *= 2
    return (*sizes, max_rows)


def bucket_of(num_rows: int, sizes: Sequence[int]) -> int | None:
    """The smallest bucket that holds so many rows; None when none does."""
    place = bisect_left(sizes, num_rows)
    return sizes[place] if place < len(sizes) else None
