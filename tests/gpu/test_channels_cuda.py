"""CUDA IPC between two processes on one GPU. Skipped without one: has not run yet."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import pytest
import torch

from experts.channel.channel import ChannelMemory, Connection, Server, connect
from experts.channel.frame import Frame, Kind, reply_to
from tests.experts.frames import SECRET

WAIT_S = 60.0
SCHEMES = ("cuda", "nixl")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def double(frame: Frame, _: Connection) -> Frame:
    assert frame.rows is not None and frame.rows.is_cuda
    return reply_to(frame, frame.rows * 2)


def serve(endpoint: str, pipe: Pipe) -> None:
    memory = ChannelMemory(2**24, device=torch.device("cuda", 0))
    server = Server(endpoint, double, SECRET, memory=memory)
    server.start()
    pipe.send(server.endpoint)
    pipe.recv()
    server.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_go_from_process_to_process_on_the_gpu(scheme: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    endpoint = f"cuda:{tmp_path}/s" if scheme == "cuda" else "nixl:127.0.0.1:0"
    process = context.Process(target=serve, args=(endpoint, theirs))
    process.start()
    memory = ChannelMemory(2**24, device=torch.device("cuda", 0))
    client = connect(ours.recv(), SECRET, timeout_s=WAIT_S, memory=memory)
    assert client.accepts_device
    kept = []
    for number in range(40):  # several times the ring's 16 MiB, some rows kept
        sent = torch.full((1000, 1024), float(number), device="cuda").bfloat16()
        client.send(Frame(Kind.ROUTE_BATCH, rows=sent), WAIT_S)
        rows = client.receive(WAIT_S).rows
        assert rows is not None and rows.is_cuda and torch.equal(rows, sent * 2)
        if number % 10 == 0:
            kept.append(rows)
    client.close()
    assert [float(rows[999, 1023]) for rows in kept] == [0.0, 20.0, 40.0, 60.0]
    ours.send("stop")
    process.join(WAIT_S)
    assert process.exitcode == 0


def test_one_process_does_not_open_its_own_memory(tmp_path: Path) -> None:
    memory = ChannelMemory(2**24, device=torch.device("cuda", 0))
    server = Server(f"cuda:{tmp_path}/s", double, SECRET, memory=memory)
    server.start()
    client = connect(server.endpoint, SECRET, timeout_s=WAIT_S, memory=memory)
    assert not client.accepts_device
    assert server.counters.fall_backs == {"cuda": 1}
    client.close()
    server.close()
