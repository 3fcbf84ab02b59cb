"""The directory's end of a member's connection: a thread sends, so that none delays another."""

import logging
import threading

from experts.channel.channel import ChannelClosed, ChannelError, Connection, FrameError
from experts.channel.frame import Frame

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 5.0


class MemberLine:
    """A registered connection; of the frames of each kind the newest wins."""

    def __init__(self, worker_id: str, connection: Connection, now_s: float) -> None:
        self.worker_id = worker_id
        self.connection = connection
        self.last_heard_s = now_s
        self._waiting: dict[str, Frame] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._sender = threading.Thread(
            target=self._send_all, name=f"directory-to-{worker_id}", daemon=True
        )
        self._sender.start()

    def post(self, kind: str, frame: Frame) -> None:
        """Send soon, instead of an older frame of the same kind that still waits."""
        with self._changed:
            self._waiting[kind] = frame
            self._changed.notify()

    def close(self) -> None:
        """Close the connection and end the sender."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.connection.close()
        if threading.current_thread() is not self._sender:
            self._sender.join(SEND_TIMEOUT_S)

    def _next(self) -> Frame | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else self._waiting.pop(next(iter(self._waiting)))

    def _send_all(self) -> None:
        while (frame := self._next()) is not None:
            try:
                self.connection.send(frame, SEND_TIMEOUT_S)
            except ChannelClosed:
                return  # on_close removes the member
            except (ChannelError, FrameError) as error:
                logger.warning("cannot tell %s: %s", self.worker_id, error)
                self.connection.close()
                return
