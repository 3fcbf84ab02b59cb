"""The sequences of one request at the engine: started, and replayed when their worker is lost.

A replay continues behind what the ledger has, at the same position of the random stream, so the
reader of the outputs sees a pause and nothing else. Every start has a run of its own: what a worker
says late is told from what its successor says by the run, never by the id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from attention.messages import TokenOutput
from cluster.frontend.backend import EngineBackend
from cluster.frontend.ledger import LedgerEntry, RequestLedger
from cluster.frontend.request import GenerateRequest

logger = logging.getLogger(__name__)

MAX_FRUITLESS_REPLAYS = 10
"""A sequence that loses so many workers in a row without a token between may be what kills them;
one that only waited in their queues has lost fewer by then."""


@dataclass(frozen=True, eq=False)
class _Run:
    """One start of a sequence; `num_emitted` ids were there before it."""

    index: int
    num_emitted: int = 0
    num_fruitless: int = 0
    """Replays in a row before this one that gave no token."""


class SequenceRuns:
    """Open sequences of one request, by index. Used from its event loop only."""

    def __init__(
        self, request: GenerateRequest, backend: EngineBackend, ledger: RequestLedger
    ) -> None:
        self._request = request
        self._backend = backend
        self._ledger = ledger
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, TokenOutput]] = asyncio.Queue()
        self._runs: dict[int, _Run] = {}

    def start(self, index: int) -> None:
        """Submit a sequence. Raises OSError when no worker can take it."""
        prompt, params = self._request.sequence(index)
        entry = LedgerEntry(self._id(index), prompt.ids, params, self._request.deadline)
        submission = self._ledger.open(entry)
        run = self._runs[index] = _Run(index)
        self._backend.submit(submission, lambda output: self._on_output(run, output))

    async def next_output(self) -> tuple[int, TokenOutput]:
        """The next output of an open sequence and its index; never one that says "lost"."""
        while True:
            index, output = await self._outputs.get()
            if index in self._runs:
                return index, output

    def abort(self, index: int) -> None:
        """Have the engine give a sequence up."""
        self._backend.abort(self._id(index))

    def end(self, index: int) -> None:
        """Forget a sequence: nothing of it is returned any more."""
        self._runs.pop(index, None)
        self._ledger.close(self._id(index))

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
            self._ledger.record(self._id(run.index), output.token_ids)
            self._outputs.put_nowait((run.index, output))

    def _replay(self, run: _Run) -> None:
        sequence_id = self._id(run.index)
        num_emitted = self._ledger.num_emitted(sequence_id)
        num_fruitless = 0 if num_emitted > run.num_emitted else run.num_fruitless + 1
        if num_fruitless > MAX_FRUITLESS_REPLAYS:
            text = f"{num_fruitless} workers in a row were lost while they computed it"
            failed = TokenOutput(request_id=sequence_id, finish_reason="error", error=text)
            self._outputs.put_nowait((run.index, failed))
            return
        logger.info("%s: worker lost, replayed behind %d tokens", sequence_id, num_emitted)
        again = self._runs[run.index] = _Run(run.index, num_emitted, num_fruitless)
        submission = self._ledger.replay(sequence_id)
        self._backend.replay(submission, lambda output: self._on_output(again, output))

    def _id(self, index: int) -> str:
        return f"{self._request.request_id}-{index}"
