"""One line a request: what it was, how it ended, where its time went. No text, no key."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from cluster.frontend.observer import RequestRecord

logger = logging.getLogger(__name__)

CHEAP_LINES_PER_S = 20
"""Requests that cost the server nothing (refused, or over without a token) get so many lines a
second; how many went without stands in the next one as `left_out`. So a flood of 20,000 refusals a
second writes 4 KB a second, and metrics count them all."""


class RequestLog:
    """A RequestObserver."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._cheap = LineBudget(CHEAP_LINES_PER_S, clock)

    def on_started(self, request_id: str) -> None:
        """Nothing: the line comes at the end."""

    def on_tokens(self, num_tokens: int, gap_s: float | None) -> None:
        """Nothing."""

    def on_refused(self, request_id: str, code: str) -> None:
        """A line, if there are not too many."""
        self._write_cheap("refused", {"request_id": request_id, "code": code})

    def on_kept(self, request_id: str) -> None:
        """A line, if there are not too many."""
        self._write_cheap("kept answer", {"request_id": request_id})

    def on_finished(self, record: RequestRecord) -> None:
        """A line."""
        if not logger.isEnabledFor(logging.INFO):
            return
        if record.completion_tokens:
            logger.info("request", extra=fields_of(record))
        else:
            self._write_cheap("request", fields_of(record))

    def _write_cheap(self, message: str, fields: dict[str, Any]) -> None:
        num_left_out = self._cheap.spend()
        if num_left_out is not None:
            logger.info(message, extra={**fields, "left_out": num_left_out or None})


class LineBudget:
    """So many lines in each second of the clock."""

    def __init__(self, lines_per_s: int, clock: Callable[[], float]) -> None:
        self._lines_per_s = lines_per_s
        self._clock = clock
        self._second = -1
        self._num_written = 0
        self._num_left_out = 0

    def spend(self) -> int | None:
        """For one line: how many were left out before it, or None if it is left out itself."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._num_written = second, 0
        if self._num_written >= self._lines_per_s:
            self._num_left_out += 1
            return None
        self._num_written += 1
        left_out, self._num_left_out = self._num_left_out, 0
        return left_out


def fields_of(record: RequestRecord) -> dict[str, Any]:
    """What a line says of a request; times in milliseconds, what does not apply is left out."""
    timing = record.timing
    return {
        "request_id": record.request_id,
        "id": record.answer_id,
        "protocol": record.protocol,
        "kind": record.kind,
        "model": record.model,
        "outcome": record.outcome,
        "code": record.code,
        "finish": ",".join(sorted(set(record.finish_reasons))),
        "stream": record.stream,
        "sequences": record.num_sequences,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "e2e_ms": _ms(record.e2e_s),
        "ttft_ms": None if record.ttft_s is None else _ms(record.ttft_s),
        "queue_ms": _ms(timing.queue_s),
        "prefill_ms": _ms(timing.prefill_s),
        "decode_ms": _ms(timing.decode_s),
        "hop_ms": _ms(timing.hop_s),
        "expert_ms": round(timing.expert_ms, 1),
        "preemptions": timing.num_preemptions,
        "replays": record.num_replays,
        "key": record.key_name,
        "trace_id": record.trace_id,
    }


def _ms(time_s: float) -> float:
    return round(1e3 * time_s, 1)
