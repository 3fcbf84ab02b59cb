"""Remote writes between hosts by NIXL: RDMA where there is hardware for it, else what UCX finds.

Each connection has an agent of its own at each end, so that a peer can write into the ring of its
connection and nothing else, and a peer that dies takes no other one's agent along. (20 ms, 15
descriptors and one thread a connection, with nixl 1.5.1 on one host.) Agents exchange their
metadata after the handshake; NIXL parses it, from peers that know the secret only. What UCX itself
listens on knows no secret: as with any RDMA fabric, its network must be a private one.

A write goes from an outbox, registered once, and is complete at the peer when its state is DONE:
the UCX back end flushes the endpoint behind the data. Host memory ("DRAM") has run between
processes of one host; memory of a GPU ("VRAM") has not run.

https://github.com/ai-dynamo/nixl, src/api/python/_api.py; src/plugins/ucx
"""

import logging
import mmap
import os
import secrets
import struct
import threading
import time
from typing import Any

import torch
from torch import Tensor

from experts.channel.arena import ALIGN
from experts.channel.connection import ChannelClosed, ChannelError, ChannelTimeout
from experts.channel.cuda_memory import DeviceBlock
from experts.channel.endpoint import Memory
from experts.channel.memory import Block, ChannelMemory, HostBlock, Outlet

MIN_BYTES = 32_768
"""Of rows on the host: fewer bytes are faster in the frame (benchmarks/bench_hop.py)."""
_ADDRESS = struct.Struct("<QI")  # of the ring, and its device's number; NIXL's metadata follows
_SPINS = 200  # looks at a write before the thread begins to sleep between them
_PAUSE_S = 50e-6


def load_nixl() -> Any:
    """NIXL's module. Raises ChannelError that says how to get it. Its log goes where ours goes."""
    try:
        from nixl import _api
    except ImportError as error:
        raise ChannelError(
            f"nixl endpoints need NIXL: pip install 'shoal-serve[nixl]' ({error})"
        ) from error
    logger = logging.getLogger("nixl")
    if logger.handlers:  # its own, which print to stdout
        logger.handlers.clear()
        logger.propagate = True
        if "NIXL_LOG_LEVEL" not in os.environ:
            logger.setLevel(logging.WARNING)
    return _api


class NixlEnd:
    """See End (offer.py). `device` None: rows of the host."""

    kind = Memory.NIXL

    def __init__(self, memory: ChannelMemory) -> None:
        api = load_nixl()
        device = memory.device
        self._segment = "DRAM" if device is None else "VRAM"
        self._device_id = 0 if device is None else device.index
        self.block = _new_block(memory.landing_bytes, device)
        self._outbox = _new_block(memory.landing_bytes, device)
        config = api.nixl_agent_config(enable_prog_thread=True, backends=["UCX"])
        self._agent = api.nixl_agent(f"shoal-{secrets.token_hex(8)}", config)
        blocks = [(b.address, b.num_bytes, self._device_id, "") for b in (self.block, self._outbox)]
        self._registered = self._agent.register_memory(blocks, self._segment)
        self._outlet: NixlOutlet | None = None

    def offer(self) -> tuple[bytes, list[int]]:
        """See End.offer. Only the ring's keys are told, not the outbox's."""
        ring = [(self.block.address, self.block.num_bytes, self._device_id, "")]
        described = self._agent.get_reg_descs(ring, self._segment)
        metadata = self._agent.get_partial_agent_metadata(described, True, ["UCX"])
        segment = 0 if self._segment == "DRAM" else 1 + self._device_id
        return _ADDRESS.pack(self.block.address, segment) + metadata, []

    def open(self, num_bytes: int, handle: bytes, fds: list[int]) -> Outlet:
        """See End.open."""
        address, segment = _ADDRESS.unpack_from(handle)
        peer = self._agent.add_remote_agent(handle[_ADDRESS.size :])
        place = (address, max(0, segment - 1), "VRAM" if segment else "DRAM")
        source = (self._outbox.address, self._device_id, self._segment)
        num_bytes = min(num_bytes, self._outbox.num_bytes)
        self._outlet = NixlOutlet(self._agent, self._outbox, source, peer, place, num_bytes)
        return self._outlet

    def close(self) -> None:
        """See End.close. Afterwards nobody can write into the ring."""
        if self._agent is None:
            return
        if self._outlet is not None:
            self._outlet.close()
        self._agent.deregister_memory(self._registered)
        self._agent = self._registered = None


def _new_block(num_bytes: int, device: torch.device | None) -> Block:
    if device is not None:
        return DeviceBlock(device, num_bytes)
    return HostBlock(mmap.mmap(-1, num_bytes))


class NixlOutlet:
    """The way into the ring of one peer. One write at a time."""

    def __init__(
        self,
        agent: Any,
        outbox: Block,
        source: tuple[int, int, str],
        peer: str,
        place: tuple[int, int, str],
        num_bytes: int,
    ) -> None:
        """source, place: address, device number and NIXL's name of the kind of memory."""
        self.num_bytes = num_bytes
        self.accepts_device = outbox.is_device
        self.min_bytes = 0 if outbox.is_device else MIN_BYTES
        self._agent = agent
        self._outbox = outbox
        self._source = source
        self._peer = peer
        self._place = place
        self._closed = False
        self._lock = threading.Lock()
        self._write(0, ALIGN, time.monotonic() + 5.0)  # makes the connection, 60-90 ms

    def put(self, offset: int, rows: Tensor, deadline_s: float | None) -> None:
        """See Outlet.put."""
        with self._lock:
            self._outbox.put(0, rows)
            self._write(offset, rows.nbytes, deadline_s)

    def _write(self, offset: int, num_bytes: int, deadline_s: float | None) -> None:
        if self._closed:
            raise ChannelClosed("closed while sending")
        handle = None
        try:
            handle = self._start(offset, num_bytes)
            state = self._agent.transfer(handle)
            spins = 0
            while state == "PROC":
                self._pause(spins, deadline_s)
                spins += 1
                state = self._agent.check_xfer_state(handle)
        except ChannelError:
            raise
        except Exception as error:  # NIXL has its own family, below Exception
            raise ChannelClosed(f"remote write failed: {error}") from error
        finally:
            if handle is not None:
                self._forget(handle)
        if state != "DONE":
            raise ChannelClosed(f"remote write ended as {state}")

    def _start(self, offset: int, num_bytes: int) -> Any:
        agent = self._agent
        (near, near_id, near_kind), (far, far_id, far_kind) = self._source, self._place
        source = agent.get_xfer_descs([(near, num_bytes, near_id)], near_kind)
        place = agent.get_xfer_descs([(far + offset, num_bytes, far_id)], far_kind)
        return agent.initialize_xfer("WRITE", source, place, self._peer)

    def _pause(self, spins: int, deadline_s: float | None) -> None:
        if self._closed:
            raise ChannelClosed("closed while sending")
        if deadline_s is not None and time.monotonic() > deadline_s:
            raise ChannelTimeout("remote write took too long; closed")
        if spins >= _SPINS:
            time.sleep(_PAUSE_S)

    def _forget(self, handle: Any) -> None:
        try:
            self._agent.release_xfer_handle(handle)
        except Exception as error:  # of a write that is still under way: NIXL aborts it
            logging.getLogger(__name__).debug("releasing a remote write: %s", error)

    def close(self) -> None:
        """See Outlet.close."""
        self._closed = True
        with self._lock:
            if self._agent is None:
                return
            agent, self._agent = self._agent, None
        try:
            agent.remove_remote_agent(self._peer)
        except Exception as error:  # it has gone before
            logging.getLogger(__name__).debug("removing %s: %s", self._peer, error)
