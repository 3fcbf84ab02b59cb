"""The door to channels: connect to an endpoint, serve one, wait for several connections at once."""

import math
import os
import select
from collections.abc import Sequence

from experts.channel.connection import (
    ChannelClosed,
    ChannelError,
    ChannelRefused,
    ChannelTimeout,
    Connection,
    Handler,
    deadline_after,
    remaining_s,
)
from experts.channel.counters import ChannelCounters
from experts.channel.dial import connect_stream
from experts.channel.endpoint import parse_endpoint
from experts.channel.frame import DEFAULT_LIMITS, FrameError, FrameLimits
from experts.channel.inproc import InprocClient, connect_inproc
from experts.channel.memory import ChannelMemory
from experts.channel.ring import RingConnection
from experts.channel.server import Server

__all__ = [
    "ChannelClosed",
    "ChannelCounters",
    "ChannelError",
    "ChannelMemory",
    "ChannelRefused",
    "ChannelTimeout",
    "Connection",
    "FrameError",
    "FrameLimits",
    "Handler",
    "Server",
    "connect",
    "wait_readable",
]

KEPT_LOOK_S = 0.02  # between looks for frames that another thread received while it sent


def connect(
    endpoint: str,
    secret: bytes,
    limits: FrameLimits = DEFAULT_LIMITS,
    timeout_s: float = 5.0,
    counters: ChannelCounters | None = None,
    memory: ChannelMemory | None = None,
) -> Connection:
    """Connect and prove the secret; the back end follows from the endpoint's prefix.

    Raises ChannelClosed (nobody there), ChannelTimeout, ChannelRefused (another secret or
    protocol), ChannelError (NIXL is not installed), ValueError (not an endpoint).
    """
    where = parse_endpoint(endpoint)
    counters = counters or ChannelCounters()
    if where.scheme == "inproc":
        return connect_inproc(where.address, secret, limits, counters)
    return connect_stream(where, secret, limits, timeout_s, counters, memory or ChannelMemory())


def wait_readable(
    connections: Sequence[Connection], timeout_s: float | None = None
) -> list[Connection]:
    """Those that have (the start of) a frame or have ended; empty when the time is over.

    One call may mix sockets and inproc clients. Connections must be clients or socket ends.
    """
    local = [connection for connection in connections if isinstance(connection, InprocClient)]
    if local:
        return _wait_mixed(connections, local, timeout_s)
    return _wait_sockets(connections, timeout_s, None)


def _wait_sockets(
    connections: Sequence[Connection], timeout_s: float | None, waker_fd: int | None
) -> list[Connection]:
    poller = select.poll()
    by_fd: dict[int, Connection] = {}
    ended: list[Connection] = []
    for connection in connections:
        fd = connection.fileno()
        if fd >= 0:
            poller.register(fd, select.POLLIN)
            by_fd[fd] = connection
        elif connection.closed and not isinstance(connection, InprocClient):
            ended.append(connection)
    if waker_fd is not None:
        poller.register(waker_fd, select.POLLIN)
    rings = [connection for connection in connections if isinstance(connection, RingConnection)]
    deadline_s = deadline_after(timeout_s)
    while True:
        kept: list[Connection] = [ring for ring in rings if ring.has_kept]
        polled = poller.poll(_slice_ms(0.0 if ended or kept else remaining_s(deadline_s), rings))
        woken = (waker_fd, select.POLLIN) in polled
        fds = [fd for fd, _ in polled if fd in by_fd and by_fd[fd] not in kept]
        ready = [by_fd[fd] for fd in fds if _has_frame(by_fd[fd])]
        if ended or kept or ready or woken or remaining_s(deadline_s) == 0:
            return ended + kept + ready


def _slice_ms(left_s: float | None, rings: Sequence[Connection]) -> int | None:
    """How long to poll. A thread that sends may keep frames: then no descriptor becomes ready."""
    if rings:
        left_s = KEPT_LOOK_S if left_s is None else min(left_s, KEPT_LOOK_S)
    return None if left_s is None else math.ceil(left_s * 1000)


def _has_frame(connection: Connection) -> bool:
    """Whether a descriptor that can be read means a frame."""
    return not isinstance(connection, RingConnection) or connection.settle()


def _wait_mixed(
    connections: Sequence[Connection], local: list[InprocClient], timeout_s: float | None
) -> list[Connection]:
    """Queues have no descriptor: an eventfd wakes the poll when one gets a frame."""
    waker_fd = os.eventfd(0, os.EFD_CLOEXEC)

    def wake() -> None:
        os.eventfd_write(waker_fd, 1)

    for connection in local:
        connection.add_waker(wake)
    try:
        if any(connection.readable for connection in local):
            timeout_s = 0
        sockets = _wait_sockets(connections, timeout_s, waker_fd)
    finally:
        for connection in local:
            connection.remove_waker(wake)
        os.close(waker_fd)
    return [c for c in local if c.readable] + sockets
