"""Sending from a thread that must not wait for a peer that has stopped reading."""

import logging
import threading
from collections import deque

from experts.channel.codec import validate
from experts.channel.connection import ChannelError, Connection
from experts.channel.frame import Frame, FrameError

logger = logging.getLogger(__name__)


class Outbox:
    """Frames to one peer, in the order of the calls.

    What the peer takes at once is sent in the caller's thread: on the hot path a change of threads
    would cost more than the frame. What it does not take, and what comes behind that, is sent by a
    thread that lives as long as something waits. A peer that reads nothing for `timeout_s` loses
    its connection and all that waits, so its time bounds what is kept for it.
    """

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._waiting: deque[Frame] = deque()
        self._sending = False  # by the thread

    def post(self, frame: Frame) -> None:
        """Send soon; rows must not be changed any more. Rows on a GPU go in the caller's thread in
        any case: they are ready on its stream.

        Raises FrameError when the frame breaks a rule or the peer's limits, ChannelError when the
        connection is gone.
        """
        with self._lock:
            on_device = frame.rows is not None and not frame.rows.is_cpu
            if not self._sending and (on_device or self._connection.takes_at_once(frame)):
                self._connection.send(frame, self._timeout_s)
                return
            validate(frame, self._connection.send_limits)
            self._waiting.append(frame)
            if not self._sending:
                self._sending = True
                name = f"to {self._connection.peer}"
                threading.Thread(target=self._send_waiting, name=name, daemon=True).start()

    def _send_waiting(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._sending = False
                    return
                frame = self._waiting.popleft()
            try:
                self._connection.send(frame, self._timeout_s)
            except (ChannelError, FrameError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._connection.closed:
            logger.warning("not sent to %s, closed: %s", self._connection.peer, error)
        self._connection.close()
        with self._lock:
            self._waiting.clear()
