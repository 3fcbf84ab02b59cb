"""Unix and TCP sockets: blocking threads, sendmsg of the tensors' own memory, one receive buffer.

Why not asyncio: for 64 KiB frames a blocking thread takes 0.09 ms a round trip, asyncio 0.12-0.24.
The socket stays in blocking mode; a call with a time limit passes MSG_DONTWAIT and polls, so that
threads with different limits can share the descriptor.
"""

import contextlib
import math
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from experts.channel.codec import HEADER_BYTES, Header, decode, decode_header, encode
from experts.channel.connection import (
    ChannelClosed,
    ChannelTimeout,
    Flow,
    deadline_after,
    remaining_s,
)
from experts.channel.counters import ChannelCounters
from experts.channel.frame import Frame, FrameError, FrameLimits
from experts.channel.memory import Bytes, host_buffer

# Plain integers: an `|` of the socket module's enum flags takes as long as a whole sendmsg.
_SEND = int(socket.MSG_NOSIGNAL)
_SEND_NOW = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
_RECEIVE = int(socket.MSG_WAITALL)
_RECEIVE_NOW = int(socket.MSG_DONTWAIT)


class StreamConnection:
    """One socket after the handshake, at either end.

    The receive side is a small state machine (`_header`, `_got`), so that a time limit that ends in
    the middle of a frame loses nothing: the next receive goes on where the last one stopped.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        flow: Flow,
        limits: FrameLimits,
        peer_limits: FrameLimits,
        counters: ChannelCounters,
        allocate: Callable[[int], Bytes] = host_buffer,
    ) -> None:
        self.peer = peer
        self._sock = sock
        self._flow = flow
        self._limits = limits
        self.send_limits = limits.smaller(peer_limits)
        self._counters = counters
        self._allocate = allocate
        self._closed = False
        self._close_lock = threading.Lock()
        self._send_lock = threading.RLock()
        self._receive_lock = threading.RLock()
        self._incoming = select.poll()
        self._incoming.register(sock, select.POLLIN)
        self._outgoing = select.poll()
        self._outgoing.register(sock, select.POLLOUT)
        self._header_bytes = bytearray(HEADER_BYTES)
        self._header: Header | None = None
        self._payload: Any = None
        self._got = 0  # bytes so far of the header, or of the payload once there is a header

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def credits(self) -> int:
        return self._flow.left

    @property
    def accepts_device(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._sock.fileno()

    # --- sending ---

    def takes_at_once(self, frame: Frame) -> bool:
        """See Connection."""
        return self._has_room(0 if frame.rows is None else frame.rows.nbytes, frame)

    def _has_room(self, row_bytes: int, frame: Frame) -> bool:
        """Whether the socket's buffer has it for so many bytes of rows and for the frame's body.

        The kernel calls a socket writable when at least a third of the buffer is free, and counts
        its own bookkeeping: a quarter is safe.
        """
        if not self._send_lock.acquire(False):  # another thread is sending
            return False
        try:
            buffer_bytes = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            num_bytes = HEADER_BYTES + row_bytes + len(frame.body)
            return num_bytes <= buffer_bytes // 4 and bool(self._outgoing.poll(0))
        except OSError:  # closed: a send fails at once
            return True
        finally:
            self._send_lock.release()

    def send(self, frame: Frame, timeout_s: float | None = None) -> None:
        """See Connection.send."""
        deadline_s = deadline_after(timeout_s)
        buffers, num_bytes = encode(frame, self.send_limits)
        self._flow.before_send(frame.kind, deadline_s)
        if not self._send_lock.acquire(True, -1 if timeout_s is None else timeout_s):
            self._flow.not_sent(frame.kind)
            raise ChannelTimeout(f"another thread is still sending to {self.peer}")
        try:
            self._write(buffers, num_bytes, deadline_s)
        finally:
            self._send_lock.release()
        self._counters.frame_out(num_bytes)

    def _write(self, buffers: list[Any], num_bytes: int, deadline_s: float | None) -> None:
        sent = self._sendmsg(buffers, deadline_s)
        if sent == num_bytes:
            return
        rest = [memoryview(buffer).cast("B") for buffer in buffers]
        while True:
            rest = _after(rest, sent)
            if not rest:
                return
            sent = self._sendmsg(rest, deadline_s)

    def _sendmsg(self, buffers: list[Any], deadline_s: float | None) -> int:
        """Bytes sent, more than 0. A timeout closes: half a frame may be on the wire."""
        flags = _SEND if deadline_s is None else _SEND_NOW
        while True:
            try:
                return self._sock.sendmsg(buffers, (), flags)
            except BlockingIOError:
                if not self._poll(self._outgoing, deadline_s):
                    self.close()
                    raise ChannelTimeout(f"{self.peer} stopped reading; closed") from None
            except OSError as error:
                raise self._lost(error) from error

    # --- receiving ---

    def receive(self, timeout_s: float | None = None) -> Frame:
        """See Connection.receive."""
        deadline_s = deadline_after(timeout_s)
        with self._receive_lock:
            try:
                return self._next_frame(deadline_s)
            except FrameError as error:
                self._counters.bad_frame(error.field)
                self.close()
                raise

    def _next_frame(self, deadline_s: float | None) -> Frame:
        if self._header is None:
            self._fill(self._header_bytes, deadline_s)
            header = decode_header(self._header_bytes, self._limits)
            self._flow.on_header(header.frame.kind)
            self._header, self._got = header, 0
            self._payload = self._allocate(header.payload_len)
        self._fill(self._payload, deadline_s)
        header, payload = self._header, self._payload
        self._header, self._payload, self._got = None, None, 0
        frame = decode(header, payload)
        frame.received_s = time.monotonic()
        self._flow.on_frame(frame.kind)
        self._counters.frame_in(HEADER_BYTES + header.payload_len)
        return frame

    def _fill(self, buffer: Any, deadline_s: float | None) -> None:
        """Receive until `buffer` is full, from `_got` on."""
        flags = _RECEIVE if deadline_s is None else _RECEIVE_NOW
        while self._got < len(buffer):
            try:
                view = memoryview(buffer)[self._got :] if self._got else buffer
                num_bytes = self._sock.recv_into(view, 0, flags)
            except BlockingIOError:
                if not self._poll(self._incoming, deadline_s):
                    raise ChannelTimeout(f"no frame from {self.peer} in time") from None
            except OSError as error:
                raise self._lost(error) from error
            else:
                if num_bytes == 0:
                    raise self._ended()
                self._got += num_bytes

    def _ended(self) -> ChannelClosed:
        if (self._header or self._got) and not self._closed:
            self._counters.bad_frame("truncated")
        self.close()
        return ChannelClosed(f"{self.peer} closed the connection")

    # --- both ---

    @staticmethod
    def _poll(poller: select.poll, deadline_s: float | None) -> bool:
        """Wait for readiness or an error of the socket; False when the time is over."""
        left_s = remaining_s(deadline_s)
        if left_s is None:
            return bool(poller.poll())
        return left_s > 0 and bool(poller.poll(math.ceil(left_s * 1000)))

    def _lost(self, error: OSError) -> ChannelClosed:
        reason = "closed by this side" if self._closed else str(error)
        self.close()
        return ChannelClosed(f"connection to {self.peer} is lost: {reason}")

    def close(self) -> None:
        """See Connection.close. The descriptor is released only when no thread is in a call on it:
        its number could be another connection's by then."""
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._flow.close()
        with self._receive_lock, self._send_lock:
            self._sock.close()
            self._release()

    def _release(self) -> None:
        """Called once, when no thread uses the socket any more."""


def _after(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of the buffers after the first `num_bytes`."""
    rest = []
    for view in views:
        if num_bytes < len(view):
            rest.append(view[num_bytes:])
        num_bytes = max(0, num_bytes - len(view))
    return rest
