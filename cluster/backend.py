"""The attention workers as the front end sees them: one place to submit, replay, abort and ask.

A sequence goes to the worker with the fewest tokens in its open sequences: the best guess at free
cache that needs no question to anybody. No caller ever waits for a worker: connecting, probing and
sending have threads of their own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

from attention.client import AttentionClient
from attention.messages import Stats, Submit, TokenOutput
from cluster.attention_line import AttentionLine, OnOutput
from cluster.frontend.backend import Readiness
from experts.channel.channel import ChannelError
from experts.messages import Snapshot

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
RECONNECT_PERIOD_S = 0.5
PROBE_TIMEOUT_S = 1.0
"""A worker that left the snapshot and answers nothing for so long hangs."""
MAX_ASKED = 32
"""Workers that are asked for their numbers at a time."""


PARK_LIMIT_S = 300.0
"""How long a sequence waits for an attention worker when all have died."""


class NoWorker(OSError):
    """No attention worker is connected at this moment."""


@dataclass(frozen=True)
class _Parked:
    """A sequence that waits for a worker, since `parked_s`."""

    submit: Submit
    on_output: OnOutput
    parked_s: float

    def due(self, now_s: float) -> Submit:
        """The message to send now: its time limit has run meanwhile."""
        if self.submit.deadline_s is None:
            return self.submit
        left_s = max(self.submit.deadline_s - (now_s - self.parked_s), 1e-3)
        return self.submit.model_copy(update={"deadline_s": left_s})


class AttentionPool:
    """Connections to every attention worker of the latest snapshot. Any thread may call.

    A broken connection is made again while its worker is a member. One whose worker is a member no
    longer is kept while the worker answers, as the directory may just have started anew; a silent
    one is closed, and its sequences are "lost".
    """

    def __init__(
        self,
        secret: bytes,
        connect: Callable[[str, bytes, float], AttentionClient] = AttentionClient,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`connect(endpoint, secret, timeout_s)` blocks and raises ChannelError."""
        self._secret = secret
        self._connect = connect
        self._clock = clock
        self._lock = threading.Condition()  # notified when members or connections change
        self._members: dict[str, str] = {}  # worker id -> endpoint
        self._lines: dict[str, AttentionLine] = {}
        self._busy: set[str] = set()  # worker ids that a thread connects to or probes
        self._owner: dict[str, AttentionLine] = {}  # by request id
        self._parked: dict[str, _Parked] = {}  # by request id
        self._snapshot: Snapshot | None = None
        self._missing_experts = False
        self._was_ready = False
        self._closing = False
        self._keeper = threading.Thread(target=self._keep_connected, name="pool", daemon=True)
        self._keeper.start()

    # ---- sequences

    def submit(self, submit: Submit, on_output: OnOutput) -> None:
        """Start a sequence; its outputs come to `on_output` from another thread. When all workers
        have died it waits for the next one. Raises NoWorker before the first was there.
        """
        if not self._was_ready:
            raise NoWorker("no attention worker is connected")
        self.replay(submit, on_output)

    def replay(self, submit: Submit, on_output: OnOutput) -> None:
        """Continue a lost sequence; without a worker it waits for one, PARK_LIMIT_S at most."""
        with self._lock:
            line = self._least_loaded()
            if line is not None:
                self._give(line, submit, on_output)
                return
            if not self._closing:
                self._parked[submit.request_id] = _Parked(submit, on_output, self._clock())
                return
        on_output(_given_up(submit.request_id))

    def abort(self, request_id: str) -> None:
        """Give a sequence up; an unknown id is no error."""
        with self._lock:
            self._parked.pop(request_id, None)
            line = self._owner.pop(request_id, None)
            if line is not None and not line.closed:
                line.open_tokens.pop(request_id, None)
                line.abort(request_id)

    @property
    def num_parked(self) -> int:
        """Sequences that wait for a worker."""
        return len(self._parked)

    def _least_loaded(self) -> AttentionLine | None:
        usable = self._usable()
        return min(usable, key=lambda line: (line.load, line.worker_id)) if usable else None

    def _usable(self) -> list[AttentionLine]:
        return [line for line in self._lines.values() if not line.closed]

    def _give(self, line: AttentionLine, submit: Submit, on_output: OnOutput) -> None:
        """Send it over a line. A replay's emitted ids are part of its max_tokens."""

        def forward(output: TokenOutput) -> None:
            if output.finish_reason is not None:
                self._settle(line, output)
            on_output(output)

        new_tokens = submit.params.max_tokens or len(submit.emitted_ids)
        line.open_tokens[submit.request_id] = len(submit.prompt_ids) + new_tokens
        self._owner[submit.request_id] = line
        line.submit(submit, forward)

    def _settle(self, line: AttentionLine, output: TokenOutput) -> None:
        """A sequence is over on this line."""
        with self._lock:
            line.open_tokens.pop(output.request_id, None)
            if self._owner.get(output.request_id) is line:
                del self._owner[output.request_id]

    # ---- connections

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """Learn who is there."""
        members = {worker.worker_id: worker.endpoint for worker in snapshot.workers_of("attention")}
        num_held, num_experts = _progress(snapshot)
        with self._lock:
            self._snapshot, self._members = snapshot, members
            self._missing_experts = num_held < num_experts
            self._was_ready = self._was_ready or snapshot.ready
            self._lock.notify_all()

    def wait_connected(self, timeout_s: float) -> None:
        """Return when there is a worker to submit to. Raises TimeoutError."""
        with self._lock:
            if not self._lock.wait_for(lambda: bool(self._usable()), timeout_s):
                raise TimeoutError(f"no attention worker connected within {timeout_s} s")

    def _keep_connected(self) -> None:
        while True:
            with self._lock:
                self._lock.wait(RECONNECT_PERIOD_S)
                if self._closing:
                    return
                work = self._due_work()
                expired = self._take_expired()
            for request_id, parked in expired.items():
                parked.on_output(TokenOutput(request_id=request_id, finish_reason="unavailable"))
            for name, job in work.items():
                threading.Thread(target=self._do, args=(name, job), daemon=True).start()

    def _take_expired(self) -> dict[str, _Parked]:
        """Sequences that have waited too long. Those with a deadline their reader ends earlier."""
        limit_s = self._clock() - PARK_LIMIT_S
        expired = {i: parked for i, parked in self._parked.items() if parked.parked_s < limit_s}
        for request_id in expired:
            del self._parked[request_id]
        return expired

    def _due_work(self) -> dict[str, Callable[[], None]]:
        """What has to be done about which worker, if nobody is at it."""
        work: dict[str, Callable[[], None]] = {}
        for name in (self._lines.keys() | self._members.keys()) - self._busy:
            line = self._lines.get(name)
            if line is None:
                work[name] = partial(self._open, name, self._members[name])
            elif line.closed:
                work[name] = self._lines.pop(name).close
            elif name not in self._members:
                work[name] = partial(self._close_if_silent, line)
        self._busy.update(work)
        return work

    def _do(self, name: str, job: Callable[[], None]) -> None:
        try:
            job()
        finally:
            with self._lock:
                self._busy.discard(name)  # no notification: a failure waits before the next try

    def _open(self, name: str, endpoint: str) -> None:
        try:
            client = self._connect(endpoint, self._secret, CONNECT_TIMEOUT_S)
        except ChannelError as error:  # tried again, unless the next snapshot says it is gone
            logger.info("attention worker %s: %s", name, error)
            return
        line = AttentionLine(name, client)
        with self._lock:
            if not self._closing:
                self._lines[name] = line
                self._give_parked(line)
                self._lock.notify_all()
                return
        line.close()

    def _give_parked(self, line: AttentionLine) -> None:
        parked, self._parked = self._parked, {}
        for replay in parked.values():
            self._give(line, replay.due(self._clock()), replay.on_output)

    def _close_if_silent(self, line: AttentionLine) -> None:
        try:
            line.stats(PROBE_TIMEOUT_S)
        except ChannelError as error:
            logger.warning("attention worker %s is given up: %s", line.worker_id, error)
            with self._lock:
                self._lines.pop(line.worker_id, None)
            line.close()

    # ---- state

    def stats(self) -> list[Stats]:
        """One entry a worker that answers; blocks up to PROBE_TIMEOUT_S if one is silent."""
        with self._lock:
            lines = list(self._lines.values())
        if not lines:
            return []
        with ThreadPoolExecutor(min(len(lines), MAX_ASKED)) as threads:
            return [stats for stats in threads.map(_stats_of, lines) if stats is not None]

    def snapshot(self) -> Snapshot | None:
        """The latest state of the cluster, None before the first."""
        return self._snapshot

    def ready(self) -> Readiness:
        """Whether requests can be served and, if not, how far the start is.

        Once everything was there, losing an expert worker or a router does not make it unready:
        requests wait for the replacement.
        """
        with self._lock:
            snapshot, connected = self._snapshot, bool(self._usable())
            was_ready, missing_experts = self._was_ready, self._missing_experts
        if snapshot is None:
            return Readiness(False, "waiting for placement")
        if not was_ready:
            return Readiness(False, snapshot.stage, *_progress(snapshot))
        if not connected:
            stage = "connecting to the attention workers"
            return Readiness(False, stage, missing="attention")
        missing: Literal["experts"] | None = "experts" if missing_experts else None
        return Readiness(True, snapshot.stage if not snapshot.ready else "ready", missing=missing)

    def close(self) -> None:
        """Close all connections; open sequences end with an error."""
        with self._lock:
            self._closing = True
            lines, self._lines = list(self._lines.values()), {}
            parked, self._parked = self._parked, {}
            self._lock.notify_all()
        for request_id, replay in parked.items():
            replay.on_output(_given_up(request_id))
        for line in lines:
            line.close()
        self._keeper.join()


def _given_up(request_id: str) -> TokenOutput:
    text = "the server is shutting down"
    return TokenOutput(request_id=request_id, finish_reason="error", error=text)


def _progress(snapshot: Snapshot) -> tuple[int, int]:
    """Experts that somebody holds, and all of them."""
    holders = [names for layer in snapshot.holders.values() for names in layer]
    return sum(1 for names in holders if names), len(holders)


def _stats_of(line: AttentionLine) -> Stats | None:
    try:
        return line.stats(PROBE_TIMEOUT_S)
    except ChannelError:
        return None  # it is on its way out of the next snapshot
