"""The same connection inside one process: no bytes, no copies, the same checks.

A client's send calls the server's handler in the caller's thread; replies and pushes are queued for
the client's receive, which any other thread may be waiting in. Tensors are passed by reference.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from experts.channel.codec import validate
from experts.channel.connection import (
    ChannelClosed,
    ChannelError,
    ChannelRefused,
    ChannelTimeout,
    ClientFlow,
    Connection,
    ServerFlow,
    deadline_after,
    remaining_s,
)
from experts.channel.counters import ChannelCounters
from experts.channel.frame import Frame, FrameLimits

MAX_QUEUED_FRAMES = 1024  # then a push waits for the reader, as with a full socket


class Host(Protocol):
    """What a connection needs of its server."""

    limits: FrameLimits
    counters: ChannelCounters
    granted_credits: int

    def accepts(self, secret: bytes) -> bool: ...

    def opened(self, connection: Connection) -> None: ...

    def answer(self, frame: Frame, connection: Connection) -> None: ...

    def ended(self, connection: Connection) -> None: ...


_hosts: dict[str, Host] = {}
_hosts_lock = threading.Lock()


def register(name: str, host: Host) -> None:
    """Make a server reachable as inproc:name. Raises ChannelError when the name is taken."""
    with _hosts_lock:
        if name in _hosts:
            raise ChannelError(f"inproc:{name} is in use by another server")
        _hosts[name] = host


def unregister(name: str, host: Host) -> None:
    """Free the name, if it is this server's."""
    with _hosts_lock:
        if _hosts.get(name) is host:
            del _hosts[name]


def connect_inproc(
    name: str, secret: bytes, limits: FrameLimits, counters: ChannelCounters
) -> "InprocClient":
    """Raises ChannelClosed when nobody has that name, ChannelRefused with another secret."""
    with _hosts_lock:
        host = _hosts.get(name)
    if host is None:
        raise ChannelClosed(f"nobody serves inproc:{name}")
    if not host.accepts(secret):
        host.counters.auth_failure()
        raise ChannelRefused("client does not know the secret")
    client = InprocClient(f"inproc:{name}", host, limits.smaller(host.limits), counters)
    host.opened(client.server_end)
    return client


class InprocClient:
    """The client's end. Holds the queue of frames on their way to it."""

    def __init__(
        self, peer: str, host: Host, limits: FrameLimits, counters: ChannelCounters
    ) -> None:
        self.peer = peer
        self.send_limits = limits
        self.flow = ClientFlow(host.granted_credits)
        self.server_end = InprocServerEnd(self, host)
        self._host = host
        self._counters = counters
        self._closed = False
        self._queue: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._handler_lock = threading.RLock()  # a socket's server handles one frame at a time too
        self._wakers: list[Callable[[], None]] = []

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def credits(self) -> int:
        return self.flow.left

    @property
    def readable(self) -> bool:
        return bool(self._queue) or self._closed

    @property
    def has_room(self) -> bool:
        """Whether a push would not wait."""
        return self._closed or len(self._queue) < MAX_QUEUED_FRAMES

    @property
    def accepts_device(self) -> bool:
        return False

    def fileno(self) -> int:
        return -1

    def takes_at_once(self, frame: Frame) -> bool:
        """See Connection. The handler may do as it likes."""
        return False

    def send(self, frame: Frame, timeout_s: float | None = None) -> None:
        """See Connection.send. The handler runs here, in the caller's thread."""
        deadline_s = deadline_after(timeout_s)
        validate(frame, self.send_limits)
        if self._closed:
            raise ChannelClosed(f"connection to {self.peer} is closed")
        self.flow.before_send(frame.kind, deadline_s)
        self._counters.frame_out(0)
        self._host.counters.frame_in(0)
        with self._handler_lock:
            frame.received_s = time.monotonic()
            self.server_end.flow.on_header(frame.kind)
            self._host.answer(frame, self.server_end)

    def receive(self, timeout_s: float | None = None) -> Frame:
        """See Connection.receive."""
        deadline_s = deadline_after(timeout_s)
        with self._changed:
            while not self._queue:
                if self._closed:
                    raise ChannelClosed(f"{self.peer} closed the connection")
                if not self._changed.wait(remaining_s(deadline_s)):
                    raise ChannelTimeout(f"no frame from {self.peer} in time")
            frame = self._queue.popleft()
            self._changed.notify_all()
        frame.received_s = time.monotonic()
        self.flow.on_frame(frame.kind)
        self._counters.frame_in(0)
        return frame

    def push(self, frame: Frame, deadline_s: float | None) -> None:
        """Queue a frame of the server for receive()."""
        with self._changed:
            while len(self._queue) >= MAX_QUEUED_FRAMES and not self._closed:
                if not self._changed.wait(remaining_s(deadline_s)):
                    raise ChannelTimeout(f"the client of {self.peer} stopped reading; closed")
            if self._closed:
                raise ChannelClosed(f"the client of {self.peer} has closed")
            self._queue.append(frame)
            self._wake()

    def add_waker(self, waker: Callable[[], None]) -> None:
        """Have `waker` called whenever `readable` may have become true."""
        with self._changed:
            self._wakers.append(waker)

    def remove_waker(self, waker: Callable[[], None]) -> None:
        with self._changed:
            self._wakers.remove(waker)

    def _wake(self) -> None:
        self._changed.notify_all()
        for waker in self._wakers:
            waker()

    def close(self) -> None:
        """See Connection.close."""
        with self._changed:
            self._queue.clear()
        self.end()

    def end(self) -> None:
        """Close from the server's side: what is already queued can still be received."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._wake()
        self.flow.close()
        self._host.ended(self.server_end)


class InprocServerEnd:
    """The server's end, as its handler sees it."""

    def __init__(self, client: InprocClient, host: Host) -> None:
        self.peer = f"{client.peer}#{threading.current_thread().name}"
        self.flow = ServerFlow(host.granted_credits)
        self.send_limits = client.send_limits
        self._client = client
        self._host = host

    @property
    def closed(self) -> bool:
        return self._client.closed

    @property
    def credits(self) -> int:
        return self.flow.left

    @property
    def accepts_device(self) -> bool:
        return False

    def fileno(self) -> int:
        return -1

    def takes_at_once(self, frame: Frame) -> bool:
        """See Connection."""
        return self._client.has_room

    def send(self, frame: Frame, timeout_s: float | None = None) -> None:
        """See Connection.send."""
        deadline_s = deadline_after(timeout_s)
        validate(frame, self.send_limits)
        self.flow.before_send(frame.kind, deadline_s)
        try:
            self._client.push(frame, deadline_s)
        except ChannelTimeout:
            self.close()
            raise
        self._host.counters.frame_out(0)

    def receive(self, timeout_s: float | None = None) -> Frame:
        raise ChannelError("frames of an inproc connection go straight to the handler")

    def close(self) -> None:
        self._client.end()
