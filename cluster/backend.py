"""The attention workers as the front end sees them: one place to submit, abort and ask.

A request goes to the worker with the fewest tokens in its open requests: the best guess at free
cache that needs no question to anybody.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from attention.client import AttentionClient
from attention.messages import Stats, Submit, TokenOutput
from cluster.frontend.backend import Readiness
from experts.channel.channel import ChannelError
from experts.messages import Snapshot

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
RECONNECT_PERIOD_S = 0.5

OnOutput = Callable[[TokenOutput], None]


class NoWorker(OSError):
    """No attention worker is connected at this moment."""


@dataclass
class _Worker:
    client: AttentionClient
    open_tokens: dict[str, int] = field(default_factory=dict)  # request id -> tokens it may hold

    @property
    def load(self) -> int:
        return sum(self.open_tokens.values())


class AttentionPool:
    """Connections to every attention worker of the latest snapshot. Any thread may call.

    A thread of its own connects, and connects again when a line breaks while the worker is still a
    member: neither the line to the directory nor a request waits for that.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._lock = threading.Condition()  # notified when members or connections change
        self._members: dict[str, str] = {}  # worker id -> endpoint
        self._workers: dict[str, _Worker] = {}
        self._owner: dict[str, str] = {}  # request id -> worker id
        self._snapshot: Snapshot | None = None
        self._was_ready = False
        self._closing = False
        self._connector = threading.Thread(target=self._connect_all, name="pool", daemon=True)
        self._connector.start()

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """Learn who is there."""
        members = {worker.worker_id: worker.endpoint for worker in snapshot.workers_of("attention")}
        with self._lock:
            self._snapshot, self._members = snapshot, members
            self._was_ready = self._was_ready or snapshot.ready
            self._lock.notify_all()

    def _connect_all(self) -> None:
        while True:
            with self._lock:
                self._lock.wait(RECONNECT_PERIOD_S)
                if self._closing:
                    return
                members = dict(self._members)
                lost = [
                    self._workers.pop(name)
                    for name, worker in list(self._workers.items())
                    if name not in members or worker.client.closed
                ]
            for worker in lost:
                worker.client.close()
            for name, endpoint in members.items():
                if name not in self._workers:
                    self._connect(name, endpoint)

    def _connect(self, name: str, endpoint: str) -> None:
        try:
            client = AttentionClient(endpoint, self._secret, CONNECT_TIMEOUT_S)
        except ChannelError as error:  # tried again, unless the next snapshot says it is gone
            logger.info("attention worker %s: %s", name, error)
            return
        with self._lock:
            self._workers[name] = _Worker(client)
            self._lock.notify_all()

    def wait_connected(self, timeout_s: float) -> None:
        """Return when there is a worker to submit to. Raises TimeoutError."""
        with self._lock:
            if not self._lock.wait_for(lambda: bool(self._connected()), timeout_s):
                raise TimeoutError(f"no attention worker connected within {timeout_s} s")

    def _connected(self) -> list[str]:
        return [name for name, worker in self._workers.items() if not worker.client.closed]

    def submit(self, submit: Submit, on_output: OnOutput) -> None:
        """Start a request; its outputs come to `on_output` from another thread.

        Raises NoWorker.
        """
        with self._lock:
            alive = self._connected()
            if not alive:
                raise NoWorker("no attention worker is connected")
            name = min(alive, key=lambda name: (self._workers[name].load, name))
            worker = self._workers[name]
            new_tokens = submit.params.max_tokens or 0
            worker.open_tokens[submit.request_id] = len(submit.prompt_ids) + new_tokens
            self._owner[submit.request_id] = name

        def forward(output: TokenOutput) -> None:
            if output.finish_reason is not None:
                self._forget(output.request_id)
            on_output(output)

        worker.client.submit(submit, forward)

    def abort(self, request_id: str) -> None:
        """Give a request up; an unknown id is no error."""
        with self._lock:
            worker = self._workers.get(self._owner.get(request_id, ""))
        self._forget(request_id)
        if worker is not None:
            worker.client.abort(request_id)

    def _forget(self, request_id: str) -> None:
        with self._lock:
            worker = self._workers.get(self._owner.pop(request_id, ""))
            if worker is not None:
                worker.open_tokens.pop(request_id, None)

    def stats(self) -> list[Stats]:
        """One entry a worker that answers."""
        with self._lock:
            workers = list(self._workers.values())
        found = []
        for worker in workers:
            try:
                found.append(worker.client.stats())
            except ChannelError:
                continue  # it is on its way out of the next snapshot
        return found

    def snapshot(self) -> Snapshot | None:
        """The latest state of the cluster, None before the first."""
        return self._snapshot

    def ready(self) -> Readiness:
        """Whether requests can be served and, if not, how far the start is.

        Once everything was there, losing an expert worker or a router does not make it unready:
        requests wait for the replacement.
        """
        with self._lock:
            snapshot, connected = self._snapshot, bool(self._connected())
            was_ready = self._was_ready
        if snapshot is None:
            return Readiness(False, "waiting for placement")
        if not was_ready:
            return Readiness(False, snapshot.stage, *_progress(snapshot))
        if not connected:
            return Readiness(False, "connecting to the attention workers")
        return Readiness(True, snapshot.stage if not snapshot.ready else "ready")

    def close(self) -> None:
        """Close all connections; open requests end with an error."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._connector.join()
        for worker in self._workers.values():
            worker.client.close()


def _progress(snapshot: Snapshot) -> tuple[int, int]:
    """Experts that somebody holds, and all of them."""
    holders = [names for layer in snapshot.holders.values() for names in layer]
    return sum(1 for names in holders if names), len(holders)
