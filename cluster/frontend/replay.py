"""The sequences of one request at the engine: started, and replayed when their worker is lost.

A replay continues behind what the ledger has, at the same position of the random stream, so the
reader of the outputs sees a pause and nothing else. Every start has a run of its own: what a worker
says late is told from what its successor says by the run, never by the id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from attention.messages import TokenOutput
from attention.trace_context import TraceContext
from cluster.frontend.backend import EngineBackend
from cluster.frontend.ledger import LedgerEntry, RequestLedger
from cluster.frontend.observer import Timing
from cluster.frontend.request import GenerateRequest

logger = logging.getLogger(__name__)

MAX_FRUITLESS_REPLAYS = 10
"""A sequence that loses so many workers in a row without a token between may be what kills them;
one that only waited in their queues has lost fewer by then."""


class Arrived(NamedTuple):
    """An output of a sequence, and when it came on the service's clock."""

    sequence: int
    output: TokenOutput
    arrived_s: float


@dataclass(slots=True, eq=False)
class _Run:
    """One start of a sequence; `num_emitted` ids were there before it."""

    index: int
    started_s: float
    num_emitted: int = 0
    num_fruitless: int = 0
    """Replays in a row before this one that gave no token."""
    before: Timing = Timing()
    """Of the runs before this one."""
    first: TokenOutput | None = None
    last: TokenOutput | None = None
    first_s: float = 0.0
    last_s: float = 0.0

    def note(self, output: TokenOutput, arrived_s: float) -> None:
        """Remember what came when."""
        if self.first is None:
            self.first, self.first_s = output, arrived_s
        self.last, self.last_s = output, arrived_s

    def timing(self, ended_s: float) -> Timing:
        """Of this run, which ended then, and those before it: adds up to the time since the first
        one started."""
        first, last = self.first, self.last
        if first is None or last is None:
            return self.before + Timing(queue_s=ended_s - self.started_s)
        prefill_s = (first.prefill_us or 0) / 1e6
        return self.before + Timing(
            queue_s=self.first_s - self.started_s - prefill_s,
            prefill_s=prefill_s,
            decode_s=ended_s - self.first_s,
            step_s=last.step_us / 1e6,
            hop_s=last.hop_us / 1e6,
            expert_ms=last.expert_us / 1e3,
            num_preemptions=last.num_preemptions or 0,
        )


class SequenceRuns:
    """Open sequences of one request, by index. Used from its event loop only."""

    def __init__(
        self,
        request: GenerateRequest,
        backend: EngineBackend,
        ledger: RequestLedger,
        clock: Callable[[], float],
        trace: TraceContext | None = None,
    ) -> None:
        """trace: what the workers' spans belong to."""
        self.num_replays = 0
        self._request = request
        self._backend = backend
        self._ledger = ledger
        self._clock = clock
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[Arrived] = asyncio.Queue()
        self._runs: dict[int, _Run] = {}

    def start(self, index: int) -> None:
        """Submit a sequence. Raises OSError when no worker can take it."""
        prompt, params = self._request.sequence(index)
        entry = LedgerEntry(
            self._id(index),
            prompt.ids,
            params,
            self._request.deadline,
            self._request.cache_salt,
            self._trace,
        )
        submission = self._ledger.open(entry)
        run = self._runs[index] = _Run(index, self._clock())
        self._backend.submit(submission, lambda output: self._on_output(run, output))

    async def next_output(self) -> Arrived:
        """The next output of an open sequence; never one that says "lost"."""
        while True:
            arrived = await self._outputs.get()
            if arrived.sequence in self._runs:
                return arrived

    def abort(self, index: int) -> None:
        """Have the engine give a sequence up."""
        self._backend.abort(self._id(index))

    def end(self, index: int) -> Timing:
        """Forget a sequence: nothing of it is returned any more. Where its time went, up to its
        last output, or to now without any."""
        self._ledger.close(self._id(index))
        run = self._runs.pop(index, None)
        if run is None:
            return Timing()
        return run.timing(self._clock() if run.last is None else run.last_s)

    def _on_output(self, run: _Run, output: TokenOutput) -> None:
        """Runs in a thread of the back end. A loop that is gone has nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, run, output)

    def _take(self, run: _Run, output: TokenOutput) -> None:
        """Record and pass on; a lost sequence goes on elsewhere whether or not anybody reads."""
        if self._runs.get(run.index) is not run:
            return  # the sequence has ended, or has another run by now
        if output.finish_reason == "lost":
            self._replay(run)
        else:
            arrived_s = self._clock()
            run.note(output, arrived_s)
            self._ledger.record(self._id(run.index), output.token_ids)
            self._outputs.put_nowait(Arrived(run.index, output, arrived_s))

    def _replay(self, run: _Run) -> None:
        sequence_id, now_s = self._id(run.index), self._clock()
        num_emitted = self._ledger.num_emitted(sequence_id)
        num_fruitless = 0 if num_emitted > run.num_emitted else run.num_fruitless + 1
        if num_fruitless > MAX_FRUITLESS_REPLAYS:
            text = f"{num_fruitless} workers in a row were lost while they computed it"
            failed = TokenOutput(request_id=sequence_id, finish_reason="error", error=text)
            self._outputs.put_nowait(Arrived(run.index, failed, now_s))
            return
        logger.info("%s: worker lost, replayed behind %d tokens", sequence_id, num_emitted)
        self.num_replays += 1
        again = _Run(run.index, now_s, num_emitted, num_fruitless, run.timing(now_s))
        self._runs[run.index] = again
        submission = self._ledger.replay(sequence_id)
        self._backend.replay(submission, lambda output: self._on_output(again, output))

    def _id(self, index: int) -> str:
        return f"{self._request.request_id}-{index}"
