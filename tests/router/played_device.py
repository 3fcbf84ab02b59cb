"""A device that is played by the CPU, for what must not go by the host: tensors that refuse to mix
with those of the host, a staging and a connection that keep books of what they move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from experts.channel.connection import Connection
from experts.channel.frame import Frame
from experts.device import ComputeDevice
from experts.staging import HostCopy, Staging
from router.device_compute import DeviceCompute
from router.gate import DeviceGate, GateSpec

TWINS = ComputeDevice(torch.device("cpu"), torch.float32, "torch", "test")


class OnDevice(Tensor):
    """Memory of the CPU that behaves like that of a GPU."""

    is_cpu = False  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        tensors = [x for arg in given for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
        if any(isinstance(x, Tensor) and not isinstance(x, cls) and x.ndim for x in tensors):
            raise RuntimeError(f"{func.__name__}: tensors on the host and on the device")
        return super().__torch_function__(func, types, args, kwargs)

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("cannot convert a tensor on a device to numpy")

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return to_host(self)


def to_host(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor).clone()


def to_device(x: Tensor) -> OnDevice:
    return x if isinstance(x, OnDevice) else x.clone().as_subclass(OnDevice)


class _Copied:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


class PlayedStaging(Staging):
    """`down` and `up`: the shapes of all it has copied."""

    def __init__(self) -> None:
        super().__init__(TWINS)
        self.down: list[tuple[int, ...]] = []
        self.up: list[tuple[int, ...]] = []

    def to_host(self, x: Tensor) -> HostCopy:
        self.down.append(tuple(x.shape))
        return _Copied(to_host(x))

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.up += [tuple(x.shape) for x in tensors if not isinstance(x, OnDevice)]
        return tuple(map(to_device, tensors))

    def take(self, width: int) -> tuple[list[int], list[int]]:
        """How many rows each copy since the last call moved, down and up."""
        moved = [[shape[0] for shape in way if shape[-1] == width] for way in (self.down, self.up)]
        self.down.clear()
        self.up.clear()
        return moved[0], moved[1]


class PlayedCompute(DeviceCompute):
    """A router's. `num_packs`: passes over the rows of a micro-batch."""

    def __init__(self, gates: Mapping[int, DeviceGate], spec: GateSpec) -> None:
        there = {
            layer: replace(
                gate,
                weight=to_device(gate.weight),
                bias=None if gate.bias is None else to_device(gate.bias),
            )
            for layer, gate in gates.items()
        }
        super().__init__(there, spec, TWINS)
        self.staging = self._staging = PlayedStaging()
        self.num_packs = 0
        self._ops = replace(self._ops, pack_rows=self._count_pack(self._ops.pack_rows))

    def _count_pack(self, pack_rows: Any) -> Any:
        def pack(x: Tensor, index: Tensor) -> Tensor:
            self.num_packs += 1
            rows: Tensor = pack_rows(x, index)
            return rows

        return pack

    def _is_here(self, x: Tensor) -> bool:
        return isinstance(x, OnDevice)


class PlayedConnection:
    """Another connection, as if rows on the device went there and back through its memory."""

    accepts_device = True

    def __init__(self, inner: Connection) -> None:
        self._inner = inner
        self.sent: list[Tensor] = []
        self._on_device: set[int] = set()  # requests

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, frame: Frame, timeout_s: float | None = None) -> None:
        rows = frame.rows
        assert rows is not None and rows.is_contiguous()
        self.sent.append(rows)
        if not rows.is_cpu:
            self._on_device.add(frame.request_id)
            frame = replace(frame, rows=to_host(rows))
        self._inner.send(frame, timeout_s)

    def receive(self, timeout_s: float | None = None) -> Frame:
        frame = self._inner.receive(timeout_s)
        if frame.rows is not None and frame.request_id in self._on_device:
            frame.rows = to_device(frame.rows)
        return frame
