"""Workers and routers die, hang, restart, move experts: no request fails, no bit changes."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import torch

from experts.checkpoint import Checkpoint
from experts.messages import Snapshot, WorkerInfo
from experts.snapshots import SnapshotBoard
from router.client import RouterClient
from router.worker import RouterWorker
from tests.router.pool import SECRET, NewPool, Pool, some_rows, spread

NUM_WORKERS = 3
NUM_DISRUPTIONS = 36
NUM_CALLERS = 3


class Routers:
    """Deployed routers over a pool, and the board that attention sees."""

    def __init__(self, pool: Pool, folder: Path, **settings: object) -> None:
        self.board = SnapshotBoard()
        self._settings = {"deterministic": True} | settings
        self._pool, self._folder, self._count = pool, folder, 0
        self._running: dict[str, tuple[RouterWorker, str]] = {}

    def add(self) -> None:
        name, self._count = f"r{self._count}", self._count + 1
        router = self._pool.router(**self._settings)
        self._running[name] = (router, router.start(f"unix:{self._folder}/{name}", SECRET))
        self.publish()

    def replace_one(self, rng: random.Random) -> None:
        """One dies while the board still names it."""
        name = rng.choice(sorted(self._running))
        self._running.pop(name)[0].close()
        self.add()

    def publish(self) -> None:
        version = self.board.generation + 1
        workers = tuple(
            WorkerInfo(worker_id=name, role="router", endpoint=endpoint, pid=1, node="")
            for name, (_, endpoint) in self._running.items()
        )
        self.board.publish(
            Snapshot(version=version, epoch=1, ready=True, stage="", workers=workers)
        )


def disrupt(pool: Pool, routers: Routers, rng: random.Random) -> None:
    """One blow; a worker that hangs goes on with the next, as others hold each expert only once."""
    for worker in pool.workers.values():
        worker.resume()
    worker_id = f"w{rng.randrange(NUM_WORKERS)}"
    held = set(pool.claims[worker_id])
    match rng.randrange(6):
        case 0:
            routers.replace_one(rng)
        case 1:  # experts leave and come back behind the table's back
            some = rng.sample(sorted(held), 5)
            pool.workers[worker_id].unload(some)
            pool.workers[worker_id].load(some)
        case 2:
            pool.workers[worker_id].stop()
        case 3:  # later than the limit, and then all at once
            pool.workers[worker_id].stop()
            threading.Timer(0.08, pool.workers[worker_id].resume).start()
        case restart:
            pool.kill(worker_id)
            if restart == 4:
                pool.forget(worker_id)
            pool.add(worker_id, held)
            pool.publish()


def test_callers_notice_nothing(
    new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    pool = new_pool(checkpoint, spread(checkpoint, NUM_WORKERS, replicas=2), socket_folder)
    quiet = pool.router(deterministic=True)
    cases = [(layer, some_rows(n, checkpoint, n)) for layer in (1, 2, 3) for n in (1, 5, 40)]
    right = [quiet.forward(layer, x) for layer, x in cases]
    routers = Routers(pool, socket_folder, hop_timeout_s=0.04, hop_timeout_cold_s=0.04)
    for _ in range(2):
        routers.add()
    storm_over, wrong = threading.Event(), []
    calls = [threading.Semaphore(0) for _ in range(NUM_CALLERS)]

    def call(i: int) -> None:
        client, rng = (
            RouterClient(routers.board, SECRET, f"a{i}", deadline_s=60.0),
            random.Random(i),
        )
        try:
            while not storm_over.is_set():
                chosen = rng.choices(range(len(cases)), k=2)
                tickets = [client.begin(*cases[j]) for j in chosen]
                for j, ticket in zip(chosen, tickets, strict=True):
                    if not torch.equal(client.finish(ticket), right[j]):
                        wrong.append(j)
                calls[i].release()
        except Exception as error:
            wrong.append(error)
            calls[i].release(NUM_DISRUPTIONS)
        finally:
            client.close()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(NUM_CALLERS)]
    for thread in threads:
        thread.start()
    rng = random.Random(7)
    for _ in range(NUM_DISRUPTIONS):
        disrupt(pool, routers, rng)
        for semaphore in calls:  # everybody gets an answer before the next blow
            assert semaphore.acquire(timeout=60)
    storm_over.set()
    for thread in threads:
        thread.join()
    assert wrong == []
