"""What a channel counts. One object may serve many connections and threads."""

import threading
from collections import Counter


class ChannelCounters:
    """Frames and bytes both ways, and what was refused and why. Read the attributes at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.frames_in = 0
        self.frames_out = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.placed_bytes_in = 0  # of these, rows that came through a ring
        self.placed_bytes_out = 0
        self.fall_backs: Counter[str] = Counter()  # by kind of memory: rows went in the frame
        self.auth_failures = 0
        self.handler_errors = 0
        self.bad_frames: Counter[str] = Counter()  # by FrameError.field, "truncated", "handshake"

    def frame_in(self, num_bytes: int, placed_bytes: int = 0) -> None:
        with self._lock:
            self.frames_in += 1
            self.bytes_in += num_bytes
            if placed_bytes:
                self.placed_bytes_in += placed_bytes

    def frame_out(self, num_bytes: int, placed_bytes: int = 0) -> None:
        with self._lock:
            self.frames_out += 1
            self.bytes_out += num_bytes
            if placed_bytes:
                self.placed_bytes_out += placed_bytes

    def fall_back(self, memory: str) -> int:
        """How often now."""
        with self._lock:
            self.fall_backs[memory] += 1
            return self.fall_backs[memory]

    def bad_frame(self, reason: str) -> None:
        with self._lock:
            self.bad_frames[reason] += 1

    def auth_failure(self) -> None:
        with self._lock:
            self.auth_failures += 1

    def handler_error(self) -> None:
        with self._lock:
            self.handler_errors += 1
