"""Expert workers, the board that names them, and what a MoE layer should answer."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experts.channel.channel import Connection, Server
from experts.channel.frame import Frame
from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from experts.messages import Snapshot, WorkerInfo
from experts.placement.space import ExpertKey
from experts.snapshots import SnapshotBoard
from experts.worker import ExpertWorker
from router.config import RouterConfig
from router.worker import RouterWorker
from tests.experts.stage import join_probes
from tests.reference import Reference

SECRET = b"a secret of the tests"
Handler = Callable[[Frame, Connection], Frame | None]
_names = itertools.count()


def every_expert(checkpoint: Checkpoint) -> list[ExpertKey]:
    config = checkpoint.config
    return [(layer, e) for layer in config.moe_layers for e in range(config.n_routed_experts)]


def spread(
    checkpoint: Checkpoint, num_workers: int, replicas: int = 1
) -> dict[str, set[ExpertKey]]:
    """Expert e on workers e, e + 1, ... modulo num_workers."""
    held: dict[str, set[ExpertKey]] = {f"w{i}": set() for i in range(num_workers)}
    for layer, expert in every_expert(checkpoint):
        for r in range(replicas):
            held[f"w{(expert + r) % num_workers}"].add((layer, expert))
    return held


class StoppableWorker(ExpertWorker):
    """Between `stop` and `resume` it accepts and reads, as the kernel does for a stopped process,
    but answers nothing; then it answers everything, late."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running = threading.Event()
        self._running.set()
        self.stop, self.resume = self._running.clear, self._running.set

    def handle(self, frame: Frame, connection: Connection) -> Frame:
        self._running.wait()
        return super().handle(frame, connection)

    def close(self) -> None:
        self.resume()
        super().close()

    def load(self, experts: Iterable[ExpertKey]) -> None:
        """Hold these as well. Raises as `hold` does."""
        self.hold(self.holds | set(experts), self.epoch)

    def unload(self, experts: Iterable[ExpertKey]) -> None:
        """Hold these no longer; unknown ones are ignored."""
        self.hold(self.holds - set(experts), self.epoch)


class Pool:
    """Serves a placement, over inproc or (with a folder) unix sockets; publishes what it serves."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        held: Mapping[str, set[ExpertKey]],
        folder: Path | None = None,
        devices: Mapping[str, ComputeDevice] | None = None,
    ) -> None:
        """devices: of the workers that do not compute on the host."""
        self.checkpoint = checkpoint
        self.board = SnapshotBoard()
        self.workers: dict[str, StoppableWorker] = {}
        self.claims: dict[str, set[ExpertKey]] = {}
        self._folder = folder
        self._devices = devices or {}
        self._endpoints: dict[str, str] = {}
        self._servers: list[Server] = []
        self._routers: list[RouterWorker] = []
        for worker_id, experts in held.items():
            self.add(worker_id, experts)
        self.publish()

    def add(self, worker_id: str, experts: set[ExpertKey]) -> StoppableWorker:
        """Start a worker; `publish` makes it known."""
        worker = StoppableWorker(
            self.checkpoint,
            worker_id,
            num_slots=len(experts) + 8,
            device=self._devices.get(worker_id),
        )
        worker.load(experts)
        self._endpoints[worker_id] = worker.start(self._new_endpoint(worker_id), SECRET)
        self.workers[worker_id] = worker
        self.claims[worker_id] = set(experts)
        return worker

    def add_impostor(self, worker_id: str, experts: set[ExpertKey], handler: Handler) -> None:
        """A server that claims to be an expert worker and answers with `handler`."""
        server = Server(self._new_endpoint(worker_id), handler, SECRET)
        server.start()
        self._servers.append(server)
        self._endpoints[worker_id] = server.endpoint
        self.claims[worker_id] = set(experts)

    def kill(self, worker_id: str) -> None:
        """Close a worker's server; the board still names it."""
        self.workers.pop(worker_id).close()

    def forget(self, worker_id: str, ready: bool = True) -> None:
        """Publish without the worker."""
        del self._endpoints[worker_id], self.claims[worker_id]
        self.publish(ready)

    def publish(self, ready: bool = True) -> None:
        """Show the claims of all workers."""
        version = self.board.generation + 1
        config = self.checkpoint.config
        holders = {
            str(layer): tuple(
                tuple(w for w in sorted(self.claims) if (layer, expert) in self.claims[w])
                for expert in range(config.n_routed_experts)
            )
            for layer in config.moe_layers
        }
        workers = tuple(
            WorkerInfo(worker_id=w, role="experts", endpoint=endpoint, pid=1, node="test")
            for w, endpoint in self._endpoints.items()
        )
        self.board.publish(
            Snapshot(
                version=version, epoch=version, ready=ready, stage="", workers=workers,
                holders=holders,
            )
        )  # fmt: skip

    def router(self, device: ComputeDevice | None = None, **settings: object) -> RouterWorker:
        """A router over this pool that is patient with busy machines, unless told otherwise."""
        patient = {"connect_timeout_s": 60.0, "hop_timeout_s": 60.0, "hop_timeout_cold_s": 60.0}
        config = RouterConfig(**{"deadline_s": 60.0} | patient | settings)
        router = RouterWorker.open(self.checkpoint, self.board, SECRET, config, device=device)
        self._routers.append(router)
        return router

    def close(self) -> None:
        for router in self._routers:
            router.close()
        for worker in self.workers.values():
            worker.close()
        for server in self._servers:
            server.close()
        join_probes()

    def _new_endpoint(self, worker_id: str) -> str:
        name = f"{worker_id}-{next(_names)}"
        return f"inproc:{name}" if self._folder is None else f"unix:{self._folder}/{name}"


NewPool = Callable[..., Pool]


def expected(reference: Reference, layer: int, x: Tensor) -> Tensor:
    """The routed experts' sum of x [T, d], one expert at a time."""
    prefix = f"model.layers.{layer}.mlp"
    ids, weights = reference._gate(f"{prefix}.gate", x, None)
    y = torch.zeros_like(x)
    for t, k in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        out = reference._mlp(f"{prefix}.experts.{ids[t, k]}", x[t : t + 1])
        y[t] += out[0] * weights[t, k]
    return y


def some_rows(num_rows: int, checkpoint: Checkpoint, seed: int = 0) -> Tensor:
    """x [T, d] float32, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, checkpoint.config.hidden_size, generator=generator)
