"""Round trip of one frame between two processes: what a MoE layer pays for each hop.

`python benchmarks/bench_hop.py` prints microseconds for unix and tcp sockets and 1, 16, 64 tokens
of 2048 bfloat16, echoed by a channel server in another process:

  bare    76 + n bytes over the same kind of socket, no checks, no tensors: the floor
  rows    ROUTE_BATCH -> ROUTE_RESULT
  pairs   EXPERT_BATCH with 6 (token, expert) pairs a token -> EXPERT_RESULT

Hops are timed in blocks: `p50` is the median of the blocks' medians, `best` the lowest of them (on
a shared machine the one least disturbed), `p99` over all hops. `--steps` also times, in one thread
over a socket pair, what sending and receiving a frame and its answer costs.

`--rings` instead compares unix, tcp, shm and nixl side by side, with rows of 64 KiB and 4 MiB: in
every round each of them runs one block, so that all meet the same machine; what is printed are the
medians of the rounds and of each round's ratio to unix.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe

os.environ.setdefault("OMP_NUM_THREADS", "1")

import machine
import torch

from experts.channel.channel import ChannelCounters, Connection, Server, connect
from experts.channel.codec import HEADER_BYTES
from experts.channel.connection import ClientFlow, ServerFlow
from experts.channel.dial import tune
from experts.channel.frame import DEFAULT_LIMITS, Frame, Kind, reply_to
from experts.channel.stream import StreamConnection

SECRET = b"benchmark"
WIDTH = 2048
PAIRS_PER_TOKEN = 6
TOKENS = (1, 16, 64)
RING_TOKENS = (16, 1024)  # 64 KiB, 4 MiB
RINGS = ("unix", "tcp", "shm", "nixl")
ROUNDS = 15
BLOCKS = 20
HOPS_PER_BLOCK = 150


def route_batch(num_tokens: int) -> Frame:
    return Frame(Kind.ROUTE_BATCH, rows=torch.randn(num_tokens, WIDTH).bfloat16())


def expert_batch(num_tokens: int) -> Frame:
    pairs = torch.arange(num_tokens * PAIRS_PER_TOKEN, dtype=torch.int32)
    return Frame(
        Kind.EXPERT_BATCH,
        rows=torch.randn(num_tokens, WIDTH).bfloat16(),
        row_ids=pairs // PAIRS_PER_TOKEN,
        expert_ids=pairs % 64,
        weights=torch.rand(len(pairs)),
    )


def echo(frame: Frame, _: Connection) -> Frame:
    return reply_to(frame, frame.rows)


def serve_channel(endpoint: str, pipe: Pipe) -> None:
    torch.set_num_threads(1)
    server = Server(endpoint, echo, SECRET)
    server.start()
    pipe.send(server.endpoint)
    pipe.recv()
    server.close()


def serve_bare(endpoint: str, pipe: Pipe) -> None:
    """Echoes messages of a length that the first four bytes of the header say."""
    family = socket.AF_UNIX if endpoint.startswith("unix") else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind(endpoint[5:] if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listener.listen()
        pipe.send(listener.getsockname())
        sock, _ = listener.accept()
    tune(sock)
    header = bytearray(HEADER_BYTES)
    with sock:
        while sock.recv_into(header, 0, socket.MSG_WAITALL):
            body = bytearray(int.from_bytes(header[:4], "little"))
            sock.recv_into(body, 0, socket.MSG_WAITALL)
            sock.sendmsg([header, body])


@contextmanager
def in_another_process(target: Callable[[str, Pipe], None], endpoint: str) -> Iterator[object]:
    """The address that the other process serves."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(endpoint, theirs))
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send("stop")
        process.join()


def timed(hop: Callable[[], object]) -> dict[str, float]:
    """Microseconds of a hop."""
    for _ in range(HOPS_PER_BLOCK):
        hop()
    blocks = [[_us(hop) for _ in range(HOPS_PER_BLOCK)] for _ in range(BLOCKS)]
    medians = [statistics.median(block) for block in blocks]
    everything = sorted(us for block in blocks for us in block)
    return {
        "p50": round(statistics.median(medians), 1),
        "best": round(min(medians), 1),
        "p99": round(everything[len(everything) * 99 // 100], 1),
    }


def _us(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def bench_channel(endpoint: str) -> Iterator[tuple[str, int, dict[str, float]]]:
    with in_another_process(serve_channel, endpoint) as address:
        client = connect(str(address), SECRET)
        for label, builder in (("rows", route_batch), ("pairs", expert_batch)):
            for num_tokens in TOKENS:
                frame = builder(num_tokens)

                def hop(frame: Frame = frame) -> Frame:
                    client.send(frame)
                    return client.receive()

                yield label, num_tokens, timed(hop)
        client.close()


def bench_bare(endpoint: str) -> Iterator[tuple[str, int, dict[str, float]]]:
    with in_another_process(serve_bare, endpoint) as address:
        family = socket.AF_UNIX if endpoint.startswith("unix") else socket.AF_INET
        with socket.socket(family) as sock:
            sock.connect(address)  # type: ignore[arg-type]
            tune(sock)
            for num_tokens in TOKENS:
                body = bytearray(num_tokens * WIDTH * 2)
                header = bytearray(len(body).to_bytes(4, "little") + bytes(HEADER_BYTES - 4))

                def hop(header: bytearray = header, body: bytearray = body) -> None:
                    sock.sendmsg([header, body])
                    sock.recv_into(header, 0, socket.MSG_WAITALL)
                    sock.recv_into(body, 0, socket.MSG_WAITALL)

                yield "bare", num_tokens, timed(hop)


def serve_rings(folder: str, pipe: Pipe) -> None:
    """One server of each kind, all in this process: only one is used at a time."""
    torch.set_num_threads(1)
    places = {"tcp": "127.0.0.1:0", "nixl": "127.0.0.1:0"}
    endpoints = [f"{scheme}:{places.get(scheme, f'{folder}/{scheme}')}" for scheme in RINGS]
    servers = [Server(endpoint, echo, SECRET) for endpoint in endpoints]
    for server in servers:
        server.start()
    pipe.send([server.endpoint for server in servers])
    pipe.recv()
    for server in servers:
        server.close()


def bench_rings(folder: str) -> None:
    with in_another_process(serve_rings, folder) as endpoints:
        clients = [connect(endpoint, SECRET) for endpoint in endpoints]  # type: ignore[attr-defined]
        for num_tokens in RING_TOKENS:
            frame = route_batch(num_tokens)
            blocks = 100 if num_tokens < 100 else 20
            rounds = [
                [_median_hop(client, frame, blocks) for client in clients]
                for _ in range(ROUNDS + 1)
            ][1:]
            for scheme, column in zip(RINGS, zip(*rounds, strict=True), strict=True):
                ratios = [us / one_round[0] for us, one_round in zip(column, rounds, strict=True)]
                us, ratio = statistics.median(column), statistics.median(ratios)
                print(f"{scheme:5s} {num_tokens * WIDTH * 2:8d} bytes  {us:8.1f} us  {ratio:5.2f}")
        for client in clients:
            client.close()


def _median_hop(client: Connection, frame: Frame, num_hops: int) -> float:
    def hop() -> None:
        client.send(frame)
        client.receive()

    return statistics.median(_us(hop) for _ in range(num_hops))


def bench_steps() -> Iterator[tuple[str, int, dict[str, float]]]:
    """One thread sends and receives over a socket pair: no waking, no other process."""
    near, far = socket.socketpair()
    tune(near)
    tune(far)
    limits, counters = DEFAULT_LIMITS, ChannelCounters()
    client = StreamConnection(near, "server", ClientFlow(32), limits, limits, counters)
    server = StreamConnection(far, "client", ServerFlow(32), limits, limits, counters)
    for label, builder in (("rows", route_batch), ("pairs", expert_batch)):
        frame = builder(16)

        def hop(frame: Frame = frame) -> None:
            client.send(frame)
            server.send(echo(server.receive(), server), 10.0)
            client.receive()

        yield f"steps, {label}", 16, timed(hop)
    client.close()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", action="store_true", help="also the cost within one process")
    parser.add_argument("--rings", action="store_true", help="instead: unix, tcp, shm and nixl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(machine.describe()))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.rings:
            bench_rings(folder)
            return
        for scheme in ("unix", "tcp"):
            for bench in (bench_bare, bench_channel):
                path = f"unix:{folder}/{bench.__name__}"
                endpoint = path if scheme == "unix" else "tcp:127.0.0.1:0"
                for label, num_tokens, result in bench(endpoint):
                    show(scheme, label, num_tokens, result)
    if arguments.steps:
        for label, num_tokens, result in bench_steps():
            show("-", label, num_tokens, result)


def show(scheme: str, label: str, num_tokens: int, result: dict[str, float]) -> None:
    figures = "  ".join(f"{name} {us:7.1f}" for name, us in result.items())
    print(f"{scheme:5s} {label:13s} {num_tokens:3d} tokens   {figures} us", flush=True)


if __name__ == "__main__":
    main()
