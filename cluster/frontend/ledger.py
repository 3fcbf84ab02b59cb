"""What every open sequence asked for and has got so far: enough to run it again anywhere.

A sequence continues exactly when the prompt, the sampling parameters, the emitted ids and the
position of the random stream are known; the position is the number of emitted ids, because the
engine draws its random numbers by (seed, position).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from attention.messages import SamplingParams, Submit
from attention.trace_context import TraceContext


@dataclass(slots=True)
class LedgerEntry:
    """One sequence. `emitted_ids`: every id the engine reported, shown to the client or not."""

    sequence_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    deadline: float | None
    """Moment on the ledger's clock at which the request fails; None: never."""
    cache_salt: str = ""
    trace: TraceContext | None = None
    """What the worker's spans belong to."""
    emitted_ids: list[int] = field(default_factory=list)

    def submission(self, now: float) -> Submit:
        """The message that starts the sequence, or continues it behind what was emitted."""
        left_s = None if self.deadline is None else max(self.deadline - now, 1e-3)
        return Submit(
            request_id=self.sequence_id,
            prompt_ids=list(self.prompt_ids),
            params=self.params,
            emitted_ids=list(self.emitted_ids),
            deadline_s=left_s,
            cache_salt=self.cache_salt,
            traceparent=self.trace.traceparent if self.trace else "",
            tracestate=self.trace.tracestate if self.trace else "",
        )


class RequestLedger:
    """Open sequences by id. Used from the event loop only."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: dict[str, LedgerEntry] = {}
        self.num_replays = 0
        """Sequences started again after the loss of a worker, since the start."""

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, entry: LedgerEntry) -> Submit:
        """Record a sequence; returns the message that starts it."""
        self._entries[entry.sequence_id] = entry
        return entry.submission(self._clock())

    def replay(self, sequence_id: str) -> Submit:
        """The message that continues an open sequence on another worker."""
        self.num_replays += 1
        return self._entries[sequence_id].submission(self._clock())

    def num_emitted(self, sequence_id: str) -> int:
        """How many ids an open sequence has got."""
        return len(self._entries[sequence_id].emitted_ids)

    def record(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """Add what the engine emitted; a closed sequence is ignored."""
        entry = self._entries.get(sequence_id)
        if entry is not None:
            entry.emitted_ids.extend(token_ids)

    def get(self, sequence_id: str) -> LedgerEntry | None:
        """The record of an open sequence."""
        return self._entries.get(sequence_id)

    def close(self, sequence_id: str) -> None:
        """Forget a sequence that ended."""
        self._entries.pop(sequence_id, None)
