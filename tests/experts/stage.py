"""Servers and clients of one back end, closed together at the end of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from experts.channel.channel import (
    ChannelCounters,
    Connection,
    FrameLimits,
    Handler,
    Server,
    connect,
)
from experts.channel.frame import Frame, reply_to
from tests.experts.frames import (
    SECRET,
)

WAIT_S = 60.0  # for what must happen; generous, since the machine may be busy
BRIEF_S = 0.03  # for what must not happen


def join_probes() -> None:
    """Wait for the threads that asked workers again which are gone by now: they log."""
    for thread in threading.enumerate():
        if thread.name.startswith("probe "):
            thread.join(WAIT_S)


def echo(frame: Frame, _: Connection) -> Frame:
    return reply_to(frame, frame.rows)


class Stage:
    """Starts servers and clients of one back end, closes all of them at the end."""

    def __init__(self, scheme: str, folder: Path) -> None:
        self.scheme = scheme
        self._folder = folder
        self._opened: list[Server | Connection] = []

    def endpoint(self) -> str:
        name = f"{self._folder.name}-{len(self._opened)}"
        return {
            "inproc": f"inproc:{name}",
            "unix": f"unix:{self._folder}/{name}",
            "tcp": "tcp:127.0.0.1:0",
            "shm": f"shm:{self._folder}/{name}",
            "nixl": "nixl:127.0.0.1:0",
        }[self.scheme]

    def serve(
        self,
        handler: Handler = echo,
        credits: int = 32,
        on_open: Callable[[Connection], None] | None = None,
        on_close: Callable[[Connection], None] | None = None,
        limits: FrameLimits | None = None,
    ) -> Server:
        limits = limits or FrameLimits()
        server = Server(
            self.endpoint(), handler, SECRET, limits, credits, "stage", on_open, on_close
        )
        server.start()
        self._opened.append(server)
        return server

    def connect(self, server: Server, counters: ChannelCounters | None = None) -> Connection:
        client = connect(server.endpoint, SECRET, timeout_s=WAIT_S, counters=counters)
        self._opened.append(client)
        return client

    def close(self) -> None:
        for opened in reversed(self._opened):
            opened.close()


class Desk:
    """A handler that answers nothing and keeps what came."""

    def __init__(self) -> None:
        self.got: list[tuple[Frame, Connection]] = []
        self._changed = threading.Condition()

    def __call__(self, frame: Frame, connection: Connection) -> None:
        with self._changed:
            self.got.append((frame, connection))
            self._changed.notify_all()

    def wait(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.got) >= number, WAIT_S)

    def server_end(self) -> Connection:
        """The connection that the first frame came on."""
        self.wait(1)
        return self.got[0][1]

    def answer(self, position: int) -> None:
        frame, connection = self.got[position]
        connection.send(reply_to(frame, frame.rows), WAIT_S)
