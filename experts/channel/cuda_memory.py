"""GPU memory that two processes of one host share by CUDA IPC. This file has not run on a GPU yet.

The receiver allocates its ring with the driver (cuMemAlloc: no caching allocator cuts or moves it;
whole pages, as a handle shares them) and sends the 64 bytes of cuIpcGetMemHandle; the sender
opens them. Copies go on the stream that is current where `put` is called, after the work that makes
the rows, and an event behind them is awaited before anybody is told. The driver refuses to open a
handle in the process that made it (offer.py: same process, no ring). Two processes may use one GPU.
A ring is freed after its peer has closed it (lease.py).

CUDA C++ Programming Guide, "Interprocess Communication"; driver API: cuMemAlloc, cuIpcGetMemHandle,
cuIpcOpenMemHandle, cuDevicePrimaryCtxRetain.
"""

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from experts.channel.blocks import BlockOutlet
from experts.channel.connection import ChannelError
from experts.channel.memory import MIB, Mark
from experts.channel.tensors import ROW_DTYPES

HANDLE_BYTES = 64
PAGE_BYTES = 2 * MIB
_LAZY_PEER_ACCESS = 1
_Handle = ctypes.c_char * HANDLE_BYTES


class _HandleByValue(ctypes.Structure):
    _fields_ = [("reserved", _Handle)]


@contextmanager
def current_context(device: torch.device) -> Iterator[Any]:
    """The driver, with this device's primary context, torch's own, current in this thread."""
    driver, context, before = _library(), _primary_context(device.index), ctypes.c_void_p()
    _check(driver.cuCtxPushCurrent_v2(context))
    try:
        yield driver
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(before))


@functools.cache
def _library() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    _check(driver.cuInit(0))
    return driver


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p:
    """Retained once, for the life of the process, as torch does."""
    context = ctypes.c_void_p()
    _check(_library().cuDevicePrimaryCtxRetain(ctypes.byref(context), index))
    return context


def _check(result: int) -> None:
    if result:
        raise ChannelError(f"CUDA driver: error {result}")


class DeviceBlock:
    """Memory of a GPU: made here, or opened from a peer's handle."""

    is_device = True

    def __init__(
        self, device: torch.device, num_bytes: int, handle: bytes | None = None, lease: int = -1
    ) -> None:
        """lease: a descriptor to close once memory of a peer has been closed (lease.py)."""
        self.num_bytes = num_bytes
        self._device = device
        self._lease = lease
        self._release = "cuMemFree_v2" if handle is None else "cuIpcCloseMemHandle"
        address = ctypes.c_uint64()
        with current_context(device) as driver:
            if handle is None:
                size = ctypes.c_size_t(-(-num_bytes // PAGE_BYTES) * PAGE_BYTES)
                _check(driver.cuMemAlloc_v2(ctypes.byref(address), size))
            else:
                opened = _HandleByValue.from_buffer_copy(handle)
                open_handle = driver.cuIpcOpenMemHandle_v2
                _check(open_handle(ctypes.byref(address), opened, _LAZY_PEER_ACCESS))
        self.address = address.value

    def __del__(self) -> None:
        if hasattr(self, "address"):
            with current_context(self._device) as driver:
                getattr(driver, self._release)(ctypes.c_uint64(self.address))
        if self._lease >= 0:
            os.close(self._lease)

    def handle(self) -> bytes:
        """What another process opens this memory with."""
        handle = _HandleByValue()
        with current_context(self._device) as driver:
            address = ctypes.c_uint64(self.address)
            _check(driver.cuIpcGetMemHandle(ctypes.byref(handle), address))
        return bytes(handle)

    def view(self, offset: int, num_rows: int, width: int, dtype: int, owner: Any) -> Tensor:
        """See Block.view."""
        row_dtype = ROW_DTYPES[dtype - 1]
        owner.__cuda_array_interface__ = {
            "version": 3,
            "shape": (num_rows * width * row_dtype.itemsize,),
            "typestr": "|u1",
            "data": (self.address + offset, False),
        }
        rows = torch.as_tensor(owner, device=self._device)
        return rows.view(row_dtype).view(num_rows, width)

    def put(self, offset: int, rows: Tensor) -> None:
        """See Block.put."""
        rows = rows.detach().contiguous()
        stream = torch.cuda.current_stream(rows.device)
        place, source = ctypes.c_uint64(self.address + offset), ctypes.c_uint64(rows.data_ptr())
        size, on = ctypes.c_size_t(rows.nbytes), ctypes.c_void_p(stream.cuda_stream)
        with current_context(rows.device) as driver:
            _check(driver.cuMemcpyDtoDAsync_v2(place, source, size, on))
        stream.record_event().synchronize()

    def mark(self) -> Mark | None:
        """See Block.mark. The stream that is current where the last tensor went."""
        event: Mark = torch.cuda.current_stream(self._device).record_event()
        return event


def open_peer(handle: bytes, num_bytes: int, device: torch.device, lease: int) -> BlockOutlet:
    """The peer's memory, as `device` reaches it. Rows of any size stay on the device. The caller
    closes `lease`."""
    block = DeviceBlock(device, num_bytes, handle, os.dup(lease))
    return BlockOutlet(block, min_bytes=0)
