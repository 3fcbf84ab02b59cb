"""What every back end promises: the Connection protocol, its errors and its credits."""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from experts.channel.frame import (
    BATCH_KINDS,
    RESULT_KINDS,
    Frame,
    FrameError,
    FrameLimits,
    Kind,
)


class ChannelError(OSError):
    """The channel could not do what was asked."""


class ChannelClosed(ChannelError):
    """The connection is gone, or there is nobody at the endpoint."""


class ChannelTimeout(ChannelError):
    """The time given to send, receive or connect ran out."""


class ChannelRefused(ChannelError):
    """The handshake failed: another secret, another protocol, or not one of ours."""


class Connection(Protocol):
    """A two-way line of frames. One thread at a time receives, any number of threads send."""

    peer: str

    @property
    def closed(self) -> bool:
        """Closed by this side, by the peer or by an error."""

    @property
    def credits(self) -> int:
        """How many more batches may be in flight."""

    @property
    def accepts_device(self) -> bool:
        """Whether frame.rows may be a tensor on a GPU; elsewhere it raises FrameError."""

    @property
    def send_limits(self) -> FrameLimits:
        """Of what may be sent: both sides' limits."""

    def takes_at_once(self, frame: Frame) -> bool:
        """Whether a send would end without the peer having to read; never waits itself."""

    def send(self, frame: Frame, timeout_s: float | None = None) -> None:
        """Send one frame; None waits without limit.

        Raises FrameError when the frame breaks a rule or the peer's limits (nothing was sent, the
        connection stays usable); ChannelTimeout without a credit, or room in the peer's ring, in
        time (still usable) or when the peer stops reading (closed: half a frame cannot be resumed);
        ChannelClosed.
        """

    def receive(self, timeout_s: float | None = None) -> Frame:
        """The next frame. Its rows may be a view of memory that the peer fills: they keep their
        place there until the last tensor that refers to them has gone.

        Raises ChannelTimeout (call again: what has arrived of a frame is kept), ChannelClosed, or
        FrameError when the peer sent garbage (counted, and the connection is closed).
        """

    def fileno(self) -> int:
        """A descriptor to poll; -1 when there is none."""

    def close(self) -> None:
        """Close both directions and wake every waiting thread. May be called twice."""


Handler = Callable[[Frame, Connection], Frame | None]


def deadline_after(timeout_s: float | None) -> float | None:
    """The monotonic time `timeout_s` from now; None stays None, for ever."""
    return None if timeout_s is None else time.monotonic() + timeout_s


def remaining_s(deadline_s: float | None) -> float | None:
    """Seconds until a monotonic deadline, never negative; None without one."""
    return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())


class Credits:
    """How many batches may still be sent before a result comes back.

    The client takes one for each batch and waits at 0. The server keeps the same count for each
    connection, so that a client that ignores its credits is noticed.
    """

    def __init__(self, granted: int) -> None:
        self._granted = granted
        self._left = granted
        self._closed = False
        self._num_waiting = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    @property
    def left(self) -> int:
        return self._left

    def take(self, deadline_s: float | None) -> None:
        """Wait for a credit. Raises ChannelTimeout or ChannelClosed."""
        with self._lock:
            if self._left == 0:
                self._wait(deadline_s)
            if self._closed:
                raise ChannelClosed("closed while waiting for a credit")
            self._left -= 1

    def _wait(self, deadline_s: float | None) -> None:
        self._num_waiting += 1
        try:
            while self._left == 0 and not self._closed:
                if not self._changed.wait(remaining_s(deadline_s)):
                    raise ChannelTimeout(f"all {self._granted} credits are in flight")
        finally:
            self._num_waiting -= 1

    def try_take(self) -> bool:
        with self._lock:
            if self._left == 0:
                return False
            self._left -= 1
            return True

    def give(self) -> None:
        """One result came back (or was sent); never more than was granted."""
        with self._lock:
            if self._left < self._granted:
                self._left += 1
                if self._num_waiting:
                    self._changed.notify()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._changed.notify_all()


class ClientFlow(Credits):
    """The client's direction: batches out, results in."""

    def before_send(self, kind: Kind, deadline_s: float | None) -> None:
        if kind in RESULT_KINDS:
            raise FrameError("direction", repr(kind), "a kind that a client sends")
        if kind in BATCH_KINDS:
            self.take(deadline_s)

    def not_sent(self, kind: Kind) -> None:
        if kind in BATCH_KINDS:
            self.give()

    def on_header(self, kind: Kind) -> None:
        if kind in BATCH_KINDS:
            raise FrameError("direction", kind, "a kind that a server sends")

    def on_frame(self, kind: Kind) -> None:
        if kind in RESULT_KINDS:
            self.give()


class ServerFlow(Credits):
    """The server's direction: batches in, results out."""

    def before_send(self, kind: Kind, deadline_s: float | None) -> None:
        """The credit goes back before the bytes leave: the client may use it at once."""
        if kind in BATCH_KINDS:
            raise FrameError("direction", repr(kind), "a kind that a server sends")
        if kind in RESULT_KINDS:
            self.give()

    def not_sent(self, kind: Kind) -> None:
        if kind in RESULT_KINDS:
            self.try_take()

    def on_header(self, kind: Kind) -> None:
        if kind in RESULT_KINDS:
            raise FrameError("direction", kind, "a kind that a client sends")
        if kind in BATCH_KINDS and not self.try_take():
            raise FrameError("credits", "exceeded", f"at most {self._granted} batches in flight")

    def on_frame(self, kind: Kind) -> None:
        """Nothing: the batch took its credit when its header came."""


Flow = ClientFlow | ServerFlow
