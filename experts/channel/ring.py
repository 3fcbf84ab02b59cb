"""A connection with landing rings: rows are put into the receiver's ring, then a frame says where.

    sender                                    receiver
    takes room in the peer's ring (Arena)
    puts the rows there (Outlet)
    envelope PLACED + frame without rows  ->  checks both, claims the region (Landing)
                                              frame.rows is a view of the ring: no copy
    frees the room                        <-  next envelope: regions nobody looks at any more

Rows of few bytes, or of more than the ring holds, travel in the frame. A sender without room says
WANT and waits, like one without credits. Meanwhile it receives what comes, since the regions that
it waits for are given back on the same socket, and keeps those frames for `receive`: as copies, so
that two full rings cannot wait for each other.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from experts.channel.arena import Arena
from experts.channel.codec import (
    HEADER_BYTES,
    Header,
    decode,
    decode_header,
    encode,
)
from experts.channel.connection import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    deadline_after,
    remaining_s,
)
from experts.channel.envelope import (
    ENVELOPE_BYTES,
    MAX_RELEASED,
    PLAIN,
    PREFIX_BYTES,
    What,
    pack,
    pack_alone,
    unpack,
)
from experts.channel.frame import Frame, FrameError
from experts.channel.landing import Landing, Region
from experts.channel.memory import Outlet
from experts.channel.offer import End
from experts.channel.stream import StreamConnection

if TYPE_CHECKING:
    from torch import Tensor

MAX_KEPT_FRAMES = 1024  # received while waiting for room; then only `receive` makes room
FLUSH_TIMEOUT_S = 10.0  # as for replies: a peer that does not read for so long is cut off
_FIRST_SLICE_S, _LAST_SLICE_S = 0.0005, 0.02  # of the wait for room, between two WANTs


class RingConnection(StreamConnection):
    """See StreamConnection; `end` is this side's memory, `outlet` the way to the peer's."""

    def __init__(self, *arguments: Any, end: End | None, outlet: Outlet | None) -> None:
        super().__init__(*arguments)
        self._end = end
        self._outlet = outlet
        self._landing = Landing(None if end is None else end.block)
        self._arena = Arena(0 if outlet is None else outlet.num_bytes)
        self._room = threading.Condition()
        self._kept: deque[Frame] = deque()
        self._prefix = bytearray(PREFIX_BYTES)
        self._region: Region | None = None

    @property
    def accepts_device(self) -> bool:
        return self._outlet is not None and self._outlet.accepts_device

    @property
    def _gets_device_rows(self) -> bool:
        """Then they are answered with such, although the way back may have fallen back."""
        return self._end is not None and self._end.block.is_device

    @property
    def has_kept(self) -> bool:
        """Whether there are frames that the socket no longer shows."""
        return bool(self._kept)

    # --- sending ---

    def takes_at_once(self, frame: Frame) -> bool:
        """See Connection. Rows wait for room in the ring, the rest of the frame in the socket."""
        rows, outlet = frame.rows, self._outlet
        if rows is None or outlet is None or not _fits(outlet, rows):
            return super().takes_at_once(frame)
        with self._room:
            has_room = self._arena.has_room(rows.nbytes)
        return has_room and self._has_room(PREFIX_BYTES, frame)

    def send(self, frame: Frame, timeout_s: float | None = None) -> None:
        """See Connection.send."""
        deadline_s = deadline_after(timeout_s)
        rows = frame.rows
        if rows is not None:
            if self._outlet is not None and _fits(self._outlet, rows):
                self._send_placed(frame, rows, self._outlet, deadline_s)
                return
            if not rows.is_cpu and (self.accepts_device or self._gets_device_rows):
                frame = replace(frame, rows=rows.cpu())
        buffers, num_bytes = encode(frame, self.send_limits)
        self._flow.before_send(frame.kind, deadline_s)
        try:
            self._post(What.INLINE, 0, 0, buffers, num_bytes, deadline_s)
        except ChannelTimeout:
            self._flow.not_sent(frame.kind)
            raise
        self._counters.frame_out(num_bytes)

    def _send_placed(
        self, frame: Frame, rows: Tensor, outlet: Outlet, deadline_s: float | None
    ) -> None:
        buffers, num_bytes = encode(frame, self.send_limits, rows.nbytes)
        self._flow.before_send(frame.kind, deadline_s)
        offset = -1
        try:
            offset = self._take_room(rows.nbytes, deadline_s)
            self._put(outlet, offset, rows, deadline_s)
            envelope = What.PLACED, offset, rows.nbytes
            self._post(*envelope, buffers, num_bytes, deadline_s)
        except BaseException:
            self._flow.not_sent(frame.kind)
            if offset >= 0:
                with contextlib.suppress(FrameError):  # a peer that lies has freed it before
                    self._free_room([offset])
            raise
        self._counters.frame_out(num_bytes + rows.nbytes, rows.nbytes)

    def _put(self, outlet: Outlet, offset: int, rows: Tensor, deadline_s: float | None) -> None:
        try:
            outlet.put(offset, rows, deadline_s)
        except ChannelError:  # a write that may still go on must not meet other rows there
            self.close()
            raise

    def _post(
        self,
        what: What,
        offset: int,
        length: int,
        buffers: list[Any],
        num_bytes: int,
        deadline_s: float | None,
    ) -> None:
        """Send the envelope, with what can be given back, and the frame."""
        left_s = remaining_s(deadline_s)
        if not self._send_lock.acquire(True, -1 if left_s is None else left_s):
            raise ChannelTimeout(f"another thread is still sending to {self.peer}")
        try:
            notices, released = self._take_free()
            is_plain = what is What.INLINE and not released
            envelope = PLAIN if is_plain else pack(what, offset, length, released)
            message = [*notices, envelope, *buffers]
            num_bytes += len(notices) * PREFIX_BYTES + ENVELOPE_BYTES
            self._write(message, num_bytes, deadline_s)
        finally:
            self._send_lock.release()

    def _take_free(self) -> tuple[list[bytes], list[int]]:
        """Regions to give back: whole envelopes of them, and what the next one has slots for."""
        free = self._landing.take_free()
        notices = []
        while len(free) > MAX_RELEASED:
            notices.append(pack_alone(What.NOTICE, free[:MAX_RELEASED]))
            free = free[MAX_RELEASED:]
        return notices, free

    def _say(self, what: What) -> None:
        """An envelope alone. Not while another thread sends (its envelope says as much) or the peer
        does not read; who waits for it asks again."""
        if not self._send_lock.acquire(False):
            return
        try:
            if not self._outgoing.poll(0):
                return
            notices, released = self._take_free()
            if what is What.WANT or released:
                notices.append(pack_alone(what, released))
            if notices:
                deadline_s = deadline_after(FLUSH_TIMEOUT_S)
                self._write(notices, len(notices) * PREFIX_BYTES, deadline_s)
        finally:
            self._send_lock.release()

    # --- room in the peer's ring ---

    def _take_room(self, num_bytes: int, deadline_s: float | None) -> int:
        """Raises ChannelTimeout or ChannelClosed."""
        slice_s = _FIRST_SLICE_S
        while True:
            with self._room:
                offset = self._arena.allocate(num_bytes)
            if offset is not None:
                return offset
            if self._closed:
                raise ChannelClosed(f"closed while waiting for room in the ring of {self.peer}")
            left_s = remaining_s(deadline_s)
            if left_s == 0:
                raise ChannelTimeout(f"no room for {num_bytes} bytes in the ring of {self.peer}")
            self._say(What.WANT)
            self._await_room(slice_s if left_s is None else min(slice_s, left_s))
            slice_s = min(2 * slice_s, _LAST_SLICE_S)

    def _await_room(self, timeout_s: float) -> None:
        """Until regions may have come back: receive, or let the thread that receives say so."""
        if len(self._kept) < MAX_KEPT_FRAMES and self._receive_lock.acquire(False):
            try:
                self._keep_frame(deadline_after(timeout_s))
            finally:
                self._receive_lock.release()
            return
        with self._room:
            self._room.wait(timeout_s)

    def _keep_frame(self, deadline_s: float | None) -> None:
        try:
            with contextlib.suppress(ChannelTimeout):
                header = self._read_prefix(deadline_s)
                if header is not None:
                    self._kept.append(_out_of_the_ring(self._read_frame(header, deadline_s)))
        except FrameError as error:
            self._counters.bad_frame(error.field)
            self.close()
            raise ChannelClosed(f"{self.peer} broke the protocol: {error}") from error

    def _free_room(self, offsets: Iterable[int]) -> None:
        with self._room:
            for offset in offsets:
                self._arena.free(offset)
            self._room.notify_all()

    # --- receiving ---

    def settle(self) -> bool:
        """Take notices that have come. Whether there is (the start of) a frame, or an end."""
        if self._kept or self._closed or not self._receive_lock.acquire(False):
            return True
        try:
            while self._read_prefix(0.0) is None:
                pass
        except ChannelTimeout:
            return self._got > 0
        except FrameError as error:
            self._counters.bad_frame(error.field)
            self.close()
        except ChannelClosed:
            pass
        finally:
            self._receive_lock.release()
        return True

    def _next_frame(self, deadline_s: float | None) -> Frame:
        if self._kept:
            return self._kept.popleft()
        header = None
        while header is None:
            header = self._read_prefix(deadline_s)
        return self._read_frame(header, deadline_s)

    def _read_prefix(self, deadline_s: float | None) -> Header | None:
        """Read an envelope and a header, unless they have been; None when no frame follows."""
        if self._header is not None:
            return self._header
        self._fill(self._prefix, deadline_s)
        self._got = 0
        envelope = unpack(self._prefix)
        if envelope.released:
            self._free_room(envelope.released)
        if not envelope.has_frame:
            if envelope.what is What.WANT:
                self._say(What.NOTICE)
            return None
        header = decode_header(self._prefix[ENVELOPE_BYTES:], self._limits)
        self._flow.on_header(header.frame.kind)
        in_frame = header.payload_len
        if envelope.what is What.PLACED:
            self._region = self._landing.claim(header, envelope.offset, envelope.length)
            in_frame -= header.row_bytes
        self._header, self._payload = header, self._allocate(in_frame)
        return header

    def _read_frame(self, header: Header, deadline_s: float | None) -> Frame:
        self._fill(self._payload, deadline_s)
        payload, region = self._payload, self._region
        self._header = self._payload = self._region = None
        self._got = 0
        frame = decode(header, payload, None if region is None else region.rows(header))
        frame.received_s = time.monotonic()
        self._flow.on_frame(frame.kind)
        placed_bytes = 0 if region is None else header.row_bytes
        self._counters.frame_in(HEADER_BYTES + header.payload_len, placed_bytes)
        return frame

    def _release(self) -> None:
        """The ring goes with the last rows that are views of it."""
        self._region = None
        self._landing = Landing(None)
        with self._room:
            self._room.notify_all()
        if self._outlet is not None:
            self._outlet.close()
        if self._end is not None:
            self._end.close()
            self._end = None


def _out_of_the_ring(frame: Frame) -> Frame:
    if frame.rows is not None:
        frame.rows = frame.rows.clone()
    return frame


def _fits(outlet: Outlet, rows: Tensor) -> bool:
    """Whether such rows travel through memory."""
    device_matches = rows.is_cpu != outlet.accepts_device
    return device_matches and max(1, outlet.min_bytes) <= rows.nbytes <= outlet.num_bytes
