"""Remote writes between hosts by NIXL: RDMA where there is hardware for it, else what UCX finds.

Each connection has an agent of its own at each end, so that a peer can write into the ring of its
connection and nothing else, and a peer that dies takes no other one's agent along. That costs about
20 ms, 15 descriptors and a thread a connection. The thread sleeps until UCX has events for it; with
the delay of 0 that NIXL's own Python class sets, it keeps a core busy. Agents exchange their
metadata after the handshake; NIXL parses it, from peers that know the secret only. What UCX itself
listens on knows no secret: as with any RDMA fabric, its network must be a private one.

A write goes from an outbox, registered once, and is complete at the peer when its state is SUCCESS:
the UCX back end flushes the endpoint behind the data. Host memory ("DRAM") has run between
processes of one host; memory of a GPU ("VRAM") has not run. A thread that has not used CUDA has no
context, and UCX would find no way between GPUs from it: so one is current in every call.

https://github.com/ai-dynamo/nixl, src/bindings/python/nixl_bindings.cpp; src/plugins/ucx
"""

import logging
import mmap
import os
import secrets
import struct
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experts.channel.arena import ALIGN
from experts.channel.blocks import HostBlock
from experts.channel.connection import ChannelClosed, ChannelError, ChannelTimeout
from experts.channel.cuda_memory import DeviceBlock, current_context
from experts.channel.endpoint import Memory
from experts.channel.memory import Block, ChannelMemory, Outlet

logger = logging.getLogger(__name__)

PROGRESS_DELAY_US = 10_000  # at most so long between two looks of UCX's thread without an event
FIRST_WRITE_TIMEOUT_S = 5.0
_HANDLE = struct.Struct("<QI")  # the ring's address, its segment; NIXL's metadata follows
_SPINS = 200  # looks at a write before the thread begins to sleep between them
_PAUSE_S = 50e-6


def load_nixl() -> Any:
    """NIXL's bindings. Raises ChannelError that says how to get them. It logs where we log."""
    try:
        from nixl import _bindings
    except ImportError as error:
        raise ChannelError(
            f"nixl endpoints need NIXL: pip install 'shoal-serve[nixl]' ({error})"
        ) from error
    nixl_logger = logging.getLogger("nixl")
    if nixl_logger.handlers:  # its own, which print to stdout
        nixl_logger.handlers.clear()
        nixl_logger.propagate = True
        if "NIXL_LOG_LEVEL" not in os.environ:
            nixl_logger.setLevel(logging.WARNING)
    return _bindings


class Place(NamedTuple):
    """Registered memory. segment 0: of the host; else 1 + the number of a GPU."""

    address: int
    segment: int

    def described(self, nixl: Any, num_bytes: int, offset: int = 0) -> tuple[Any, Any]:
        """NIXL's names for the kind of memory and for a part of it."""
        kind = nixl.VRAM_SEG if self.segment else nixl.DRAM_SEG
        return kind, (self.address + offset, num_bytes, max(0, self.segment - 1))


class NixlEnd:
    """See End (offer.py). Without `device` for rows of the host."""

    kind = Memory.NIXL

    def __init__(self, memory: ChannelMemory) -> None:
        self._nixl = nixl = load_nixl()
        self._min_bytes = memory.min_bytes if memory.device is None else 0
        self.block = _new_block(memory.landing_bytes, memory.device)
        self._outbox = _new_block(memory.landing_bytes, memory.device)
        self._device = memory.device
        self._segment = 0 if memory.device is None else 1 + memory.device.index
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.pthrDelay = PROGRESS_DELAY_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        try:
            with _in_context(memory.device):
                self._agent = nixl.nixlAgent(f"shoal-{secrets.token_hex(8)}", config)
                self._backend = self._agent.createBackend("UCX", {})
                self._registered = [self._register(block) for block in (self.block, self._outbox)]
        except Exception as error:  # NIXL has its own family, right below Exception
            raise ChannelError(f"NIXL cannot use this memory: {error}") from error
        self._outlet: NixlOutlet | None = None

    def _register(self, block: Block) -> Any:
        place = Place(block.address, self._segment)
        kind, part = place.described(self._nixl, block.num_bytes)
        registered = self._nixl.nixlRegDList(kind, [(*part, "")])
        self._agent.registerMem(registered, [self._backend])
        return registered

    def offer(self) -> tuple[bytes, list[int]]:
        """See End.offer. Only the ring's keys are told, not the outbox's."""
        metadata = self._agent.getLocalPartialMD(self._registered[0], True, [self._backend])
        return _HANDLE.pack(self.block.address, self._segment) + metadata, []

    def open(self, num_bytes: int, handle: bytes, fds: list[int]) -> Outlet:
        """See End.open."""
        ring = Place(*_HANDLE.unpack_from(handle))
        with _in_context(self._device):
            peer = self._agent.loadRemoteMD(handle[_HANDLE.size :])
        outbox = Place(self._outbox.address, self._segment)
        writer = Writer(self._nixl, self._agent, peer, outbox, ring, self._device)
        num_bytes = min(num_bytes, self._outbox.num_bytes)
        self._outlet = NixlOutlet(writer, self._outbox, num_bytes, self._min_bytes)
        return self._outlet

    def close(self) -> None:
        """See End.close. Afterwards nobody can write into the ring."""
        if self._outlet is not None:
            self._outlet.close()
        for registered in self._registered:
            self._agent.deregisterMem(registered, [self._backend])
        self._registered = []
        self._agent = None


def _in_context(device: torch.device | None) -> AbstractContextManager[object]:
    return nullcontext() if device is None else current_context(device)


def _new_block(num_bytes: int, device: torch.device | None) -> Block:
    if device is not None:
        return DeviceBlock(device, num_bytes)
    return HostBlock(mmap.mmap(-1, num_bytes))


class Writer:
    """Writes from the outbox into the ring of one peer."""

    def __init__(
        self,
        nixl: Any,
        agent: Any,
        peer: bytes,
        outbox: Place,
        ring: Place,
        device: torch.device | None,
    ) -> None:
        """device: of the outbox, None for the host."""
        self.stopped = False
        self._device = device
        self._nixl = nixl
        self._agent = agent
        self._peer = peer
        self._outbox = outbox
        self._ring = ring

    def write(self, offset: int, num_bytes: int, deadline_s: float | None) -> None:
        """The first bytes of the outbox. Raises ChannelClosed or ChannelTimeout."""
        with _in_context(self._device):
            self._write(offset, num_bytes, deadline_s)

    def _write(self, offset: int, num_bytes: int, deadline_s: float | None) -> None:
        nixl = self._nixl
        kind, part = self._outbox.described(nixl, num_bytes)
        source = nixl.nixlXferDList(kind, [part])
        kind, part = self._ring.described(nixl, num_bytes, offset)
        place = nixl.nixlXferDList(kind, [part])
        request = None
        try:
            request = self._agent.createXferReq(nixl.NIXL_WRITE, source, place, self._peer)
            state = self._agent.postXferReq(request, "")
            spins = 0
            while state == nixl.NIXL_IN_PROG:
                spins = self._pause(spins, deadline_s)
                state = self._agent.getXferStatus(request)
        except ChannelError:
            raise
        except Exception as error:
            raise ChannelClosed(f"remote write failed: {error}") from error
        finally:
            if request is not None:
                self._quietly(self._agent.releaseXferReq, request)  # NIXL aborts one under way
        if state != nixl.NIXL_SUCCESS:
            raise ChannelClosed(f"remote write ended as {state}")

    def _pause(self, spins: int, deadline_s: float | None) -> int:
        if self.stopped:
            raise ChannelClosed("closed while sending")
        if deadline_s is not None and time.monotonic() > deadline_s:
            raise ChannelTimeout("remote write took too long; closed")
        if spins >= _SPINS:
            time.sleep(_PAUSE_S)
        return spins + 1

    def forget_peer(self) -> None:
        """May be called twice."""
        if self._agent is not None:
            self._quietly(self._agent.invalidateRemoteMD, self._peer)
            self._agent = None

    @staticmethod
    def _quietly(call: Any, argument: Any) -> None:
        """Cleaning up after a peer that may have gone."""
        try:
            call(argument)
        except Exception as error:
            logger.debug("NIXL: %s", error)


class NixlOutlet:
    """See Outlet. One write at a time."""

    def __init__(self, writer: Writer, outbox: Block, num_bytes: int, min_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.accepts_device = outbox.is_device
        self.min_bytes = min_bytes
        self._outbox = outbox
        self._writer = writer
        self._lock = threading.Lock()
        # Makes UCX's connection: 50 ms that the first frame does not have to wait.
        writer.write(0, ALIGN, time.monotonic() + FIRST_WRITE_TIMEOUT_S)

    def put(self, offset: int, rows: Tensor, deadline_s: float | None) -> None:
        """See Outlet.put."""
        with self._lock:
            if self._writer.stopped:
                raise ChannelClosed("closed while sending")
            self._outbox.put(0, rows)
            self._writer.write(offset, rows.nbytes, deadline_s)

    def close(self) -> None:
        """See Outlet.close."""
        self._writer.stopped = True
        with self._lock:
            self._writer.forget_peer()
