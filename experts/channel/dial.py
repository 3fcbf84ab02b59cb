"""Opening a socket to a server: options, time limits, handshake."""

import socket
import struct
import time

from experts.channel.connection import ChannelClosed, ChannelTimeout, ClientFlow
from experts.channel.counters import ChannelCounters
from experts.channel.endpoint import Endpoint
from experts.channel.establish import establish
from experts.channel.frame import FrameLimits
from experts.channel.handshake import HANDSHAKE_TIMEOUT_S, Terms, join_handshake
from experts.channel.memory import ChannelMemory
from experts.channel.offer import check_available, usable_memory
from experts.channel.stream import StreamConnection

UNIX_BUFFER_BYTES = 2**20  # the kernel cuts it to wmem_max; TCP tunes its own
TCP_USER_TIMEOUT_MS = 10_000  # unacknowledged for so long (a partition): the connection is dead


def tune(sock: socket.socket) -> None:
    """Options of a data-plane socket, at both ends."""
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNIX_BUFFER_BYTES)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)


def connect_stream(
    endpoint: Endpoint,
    secret: bytes,
    limits: FrameLimits,
    timeout_s: float,
    counters: ChannelCounters,
    memory: ChannelMemory,
) -> StreamConnection:
    """Connect and prove the secret. Raises ChannelClosed, ChannelTimeout or ChannelRefused."""
    check_available(endpoint)
    deadline_s = time.monotonic() + timeout_s
    sock = _open_socket(endpoint, timeout_s)
    try:
        tune(sock)
        left_s = deadline_s - time.monotonic()
        mine = Terms(limits, 0, usable_memory(endpoint, sock, memory))
        theirs = join_handshake(sock, secret, mine, min(left_s, HANDSHAKE_TIMEOUT_S))
        flow = ClientFlow(theirs.credits)
        peer = str(endpoint)
        return establish(sock, peer, endpoint, flow, mine, theirs, memory, counters)
    except BaseException:
        sock.close()
        raise


def _open_socket(endpoint: Endpoint, timeout_s: float) -> socket.socket:
    try:
        if endpoint.is_unix:
            return _open_unix_socket(endpoint.address, timeout_s)
        return socket.create_connection((endpoint.address, endpoint.port), timeout_s)
    except (TimeoutError, BlockingIOError) as error:
        raise ChannelTimeout(f"no answer from {endpoint} in {timeout_s} s") from error
    except OSError as error:
        raise ChannelClosed(f"cannot connect to {endpoint}: {error}") from error


def _open_unix_socket(path: str, timeout_s: float) -> socket.socket:
    """A full backlog makes a non-blocking unix connect fail at once; SO_SNDTIMEO makes it wait."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.connect(path)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
    except OSError:
        sock.close()
        raise
    return sock
