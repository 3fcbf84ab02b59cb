"""Outboxes: nobody waits for a peer that does not read, nothing is lost or out of order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.channel.channel import ChannelClosed, Connection, FrameError
from experts.channel.frame import Frame, FrameLimits, Kind
from experts.channel.outbox import Outbox
from tests.experts.frames import control
from tests.experts.stage import WAIT_S, Desk, Stage

LARGE_BYTES = 4 * 2**20  # no socket's buffer takes two of them


@pytest.fixture(params=["unix", "tcp", "shm", "inproc"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(request.param, tmp_path)
    yield made
    made.close()


def both_ends(stage: Stage) -> tuple[Connection, Connection]:
    """The server's, whose outbox is tried, and the client's."""
    desk = Desk()
    client = stage.connect(stage.serve(desk))
    client.send(control(), WAIT_S)
    return desk.server_end(), client


def numbered(number: int, num_bytes: int = 2) -> Frame:
    return Frame(Kind.CONTROL, request_id=number, body=b"{}".ljust(num_bytes))


def senders(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that send to it, as they do."""
    found: list[threading.Thread] = []
    send = connection.send

    def noted(*arguments: Any) -> None:
        found.append(threading.current_thread())
        send(*arguments)

    monkeypatch.setattr(connection, "send", noted)
    return found


def test_what_the_peer_takes_goes_from_the_callers_thread(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = both_ends(stage)
    outbox, threads = Outbox(ours, WAIT_S), senders(ours, monkeypatch)
    for number in range(20):
        outbox.post(numbered(number))
        assert theirs.receive(WAIT_S).request_id == number
    assert set(threads) == {threading.current_thread()}


def test_a_caller_does_not_wait_for_a_peer_that_does_not_read(stage: Stage) -> None:
    ours, theirs = both_ends(stage)
    outbox = Outbox(ours, WAIT_S)
    sizes = [LARGE_BYTES, 2] * 10
    begun_s = time.monotonic()
    for number, num_bytes in enumerate(sizes):
        outbox.post(numbered(number, num_bytes))
    assert time.monotonic() - begun_s < WAIT_S / 2
    got = [theirs.receive(WAIT_S) for _ in sizes]
    assert [frame.request_id for frame in got] == list(range(len(sizes)))
    assert [len(frame.body) for frame in got] == sizes


def test_rows_do_not_wait_either(stage: Stage) -> None:
    """Through a ring they need room there: 64 MB are more than it has."""
    ours, theirs = both_ends(stage)
    outbox = Outbox(ours, WAIT_S)
    begun_s = time.monotonic()
    for number in range(16):
        rows = torch.full((1024, 1024), float(number))
        outbox.post(Frame(Kind.ROUTE_RESULT, request_id=number, rows=rows))
    assert time.monotonic() - begun_s < WAIT_S / 2
    for number in range(16):
        frame = theirs.receive(WAIT_S)
        assert frame.rows is not None
        assert frame.request_id == number and bool((frame.rows == number).all())


def test_a_peer_that_reads_nothing_in_time_is_cut_off(tmp_path: Path) -> None:
    stage = Stage("unix", tmp_path)
    ours, _ = both_ends(stage)
    outbox = Outbox(ours, timeout_s=0.05)
    with pytest.raises(ChannelClosed):
        for number in range(1000):
            outbox.post(numbered(number, LARGE_BYTES))
            threading.Event().wait(0.01)
    assert ours.closed
    stage.close()


def test_a_frame_that_breaks_a_rule_is_refused_in_the_callers_thread(stage: Stage) -> None:
    ours, theirs = both_ends(stage)
    outbox, too_large = Outbox(ours, WAIT_S), FrameLimits().max_body_bytes + 1
    with pytest.raises(FrameError, match="body_bytes"):
        outbox.post(numbered(0, too_large))
    for number in range(1, 4):  # then the thread has work
        outbox.post(numbered(number, LARGE_BYTES))
    with pytest.raises(FrameError, match="body_bytes"):
        outbox.post(numbered(4, too_large))
    outbox.post(numbered(5))
    assert [theirs.receive(WAIT_S).request_id for _ in range(4)] == [1, 2, 3, 5]
