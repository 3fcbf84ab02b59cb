"""Section 4: an expert worker in a second process, reached over each kind of channel.

unix: rows through pinned host memory and a socket; shm: through host memory that both processes
map; cuda: from one process's device memory to the other's. Times are round trips as the host sees
them. The answer must be, bit for bit, what the same kernels give in this process.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import torch
from torch import Tensor

from experts.channel.channel import ChannelMemory, Connection, connect
from experts.channel.frame import Frame, Kind, Status
from experts.compute import PairBatch
from experts.device_compute import DeviceCompute
from experts.staging import Staging
from experts.weights import load_expert
from experts.worker import ExpertWorker
from gpu_check.child import open_context
from gpu_check.compare import EXACT, difference
from gpu_check.decode import shape_of
from gpu_check.expert_data import Local, random, route
from gpu_check.model import SeededCheckpoint, lite_config
from gpu_check.plan import Context, Unit
from gpu_check.rows import Benchmark, Check, Row
from gpu_check.variants import check_warm

SCHEMES, SMOKE_SCHEMES = ("unix", "shm", "cuda"), ("shm",)
ROWS, SMOKE_ROWS = (1, 64, 1024), (3,)
SERVED_ROWS = (1, 2, 15, 16, 17, 64, 65, 200, 256, 512, 513, 1000, 1024, 4096)
"""Of batches that must find their kernels compiled."""
NUM_HOPS, SMOKE_HOPS = 100, 1
NUM_LAYERS = 2  # a dense one and one with experts
READY_TIMEOUT_S, HOP_TIMEOUT_S = 120.0, 30.0
"""Ready: with cold compiles."""
SECRET = b"both processes are ours"


def units(context: Context) -> Iterator[Unit]:
    """What a warm worker compiles, then one for each kind of channel."""
    yield Unit("expert batches after warm-up", lambda: [warm_batches(context)])
    for scheme in SMOKE_SCHEMES if context.smoke else SCHEMES:
        yield Unit(f"expert worker over {scheme}", lambda scheme=scheme: hops(context, scheme))


def warm_batches(context: Context) -> Check:
    """An expert worker compiles nothing after its warm-up, whatever the size of the batch."""
    here, local, layer = _all_experts(context)

    def serve() -> None:
        for count in SMOKE_ROWS if context.smoke else SERVED_ROWS:
            here.run(_batch(context, local, layer, count))

    return check_warm(context, "V2-Lite expert batches", here.warm_up, serve)


def _all_experts(context: Context) -> tuple[DeviceCompute, Local, int]:
    """Those of one layer in this process, and its number."""
    config = lite_config(smoke=context.smoke, num_layers=NUM_LAYERS)
    layer, num_experts = config.moe_layers[0], config.n_routed_experts
    checkpoint = SeededCheckpoint(config, context.device)
    here = DeviceCompute.open(checkpoint, num_experts, context.compute)
    for expert in range(num_experts):
        here.fill((layer, expert), expert, load_expert(checkpoint, layer, expert))
    return here, Local(shape_of(config), num_experts, config.num_experts_per_tok), layer


def hops(context: Context, scheme: str) -> Iterator[Row]:
    """Batches of several sizes."""
    here, local, layer = _all_experts(context)
    staging = Staging(context.compute)
    with worker(context, scheme) as connection:
        for count in SMOKE_ROWS if context.smoke else ROWS:
            batch = _batch(context, local, layer, count)
            expected = here.run(batch)
            found = _hop(connection, staging, batch)
            place = f"V2-Lite layer, {count} rows"
            error, problem = difference(found, expected)
            dtype = str(batch.rows.dtype).removeprefix("torch.")
            yield Check(f"hop over {scheme}", place, dtype, error, EXACT, problem)
            seconds = _median_s(context, connection, staging, batch)
            note = f"{(batch.rows.nbytes + found.nbytes) / 1e3:.0f} kB there and back"
            yield Benchmark(f"hop over {scheme}", place, dtype, 0, 0, seconds, note=note)


def _batch(context: Context, local: Local, layer: int, count: int) -> PairBatch:
    routed = route(context, local, count, 1)
    rows = random(context, 2, count, local.shape.hidden_size).to(context.compute.dtype)
    ids = routed.expert_ids.cpu()
    weights = routed.pair_weights.cpu()
    return PairBatch(layer, rows, routed.row_ids.cpu(), ids, ids, weights, per_pair=False)


def _hop(connection: Connection, staging: Staging, batch: PairBatch) -> Tensor:
    """There and back, from device memory to device memory."""
    rows = batch.rows
    if not connection.accepts_device:
        rows = staging.to_host(rows).wait()
    frame = Frame(
        Kind.EXPERT_BATCH,
        layer=batch.layer,
        rows=rows,
        row_ids=batch.row_ids,
        expert_ids=batch.expert_ids,
        weights=batch.weights,
    )
    connection.send(frame, HOP_TIMEOUT_S)
    answer = connection.receive(HOP_TIMEOUT_S)
    if answer.status != Status.OK or answer.rows is None:
        raise RuntimeError(f"the worker answered {answer.status.name}: {answer.text}")
    (result,) = staging.to_device(answer.rows)
    return result


def _median_s(
    context: Context, connection: Connection, staging: Staging, batch: PairBatch
) -> float | None:
    times = []
    for _ in range(SMOKE_HOPS if context.smoke else NUM_HOPS):
        begin = time.perf_counter()
        _hop(connection, staging, batch)
        if context.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        times.append(time.perf_counter() - begin)
    return None if context.smoke else statistics.median(times)


@contextmanager
def worker(context: Context, scheme: str) -> Iterator[Connection]:
    """A connection to a worker that holds all experts of the layer, in a process of its own."""
    method = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = method.Pipe()
    with tempfile.TemporaryDirectory(prefix="shoal-gpu-") as folder:
        endpoint = f"{scheme}:{Path(folder) / 'experts'}"
        process = method.Process(target=serve, args=(context.smoke, endpoint, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            if not ours.poll(READY_TIMEOUT_S):
                raise RuntimeError(f"the worker was not ready within {READY_TIMEOUT_S:.0f} s")
            endpoint = ours.recv()
            device = context.device if context.device.type == "cuda" else None
            connection = connect(endpoint, SECRET, memory=ChannelMemory(device=device))
            try:
                yield connection
            finally:
                connection.close()
        finally:
            ours.close()
            process.join(HOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()


def serve(smoke: bool, endpoint: str, parent: Pipe) -> None:
    """The second process: serves until the parent closes its end."""
    context = open_context(smoke)
    config = lite_config(smoke=smoke, num_layers=NUM_LAYERS)
    checkpoint = SeededCheckpoint(config, context.device)
    num_experts = config.n_routed_experts
    experts = ExpertWorker(checkpoint, "experts-0", num_experts, device=context.compute)
    experts.hold([(config.moe_layers[0], expert) for expert in range(num_experts)])
    parent.send(experts.start(endpoint, SECRET))
    try:
        parent.recv()
    except EOFError:
        experts.close()
