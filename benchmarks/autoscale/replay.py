"""Sends a trace to a server, whatever the server makes of it, and notes when each token came."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from serving.drive import OnTokens, Target
from serving.summary import RequestRecord

from autoscale.trace import Request

ANSWER_TIMEOUT_S = 60.0
NOT_ANSWERED = "not answered in time"


def replay(target: Target, trace: Sequence[Request], begin_s: float) -> list[RequestRecord]:
    """The records of the requests, in order; `begin_s` on time.perf_counter is second 0.

    A request that is sent late still counts from when it was due. One that fails, or is not
    answered ANSWER_TIMEOUT_S after the last one was sent, has an error.
    """
    records = [RequestRecord(begin_s + request.due_s) for request in trace]
    open_requests = _Open(len(trace))
    for request, record in zip(trace, records, strict=True):
        time.sleep(max(0.0, record.due_s - time.perf_counter()))
        prompt_ids = list(request.item.prompt_ids)
        target.submit(prompt_ids, request.item.new_tokens, open_requests.noting(record))
    open_requests.wait(ANSWER_TIMEOUT_S)
    for record, request in zip(records, trace, strict=True):
        if record.error is None and len(record.token_times_s) < request.item.new_tokens:
            record.error = NOT_ANSWERED
    return records


class _Open:
    """Counts the requests that are not over."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._changed = threading.Condition()

    def noting(self, record: RequestRecord) -> OnTokens:
        """What a target is to call with the tokens of this request."""

        def on_tokens(count: int, is_last: bool, error: str | None) -> None:
            record.token_times_s.extend([time.perf_counter()] * count)
            if is_last:
                record.error = error
                with self._changed:
                    self._number -= 1
                    self._changed.notify()

        return on_tokens

    def wait(self, timeout_s: float) -> None:
        """Until all are over, or the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self._number == 0, timeout_s)
