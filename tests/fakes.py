"""An engine that says what a test tells it to, from a thread of its own like a real one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal

from attention.messages import Stats, Submit, TokenLogprob, TokenOutput
from cluster.frontend.backend import Readiness

OnOutput = Callable[[TokenOutput], None]
TIMEOUT_S = 20.0


class FakeEngine:
    """Implements cluster.frontend.backend.EngineBackend.

    Every sequence gets `ids`, `per_output` at a time, cut at its `max_tokens`. With `hold_after`
    it stops after so many tokens until `release()` or an abort.
    """

    def __init__(
        self,
        ids: Sequence[int],
        *,
        finish: Literal["stop", "length", "error", "abort"] = "stop",
        error: str | None = None,
        per_output: int = 1,
        hold_after: int | None = None,
        cached: int = 0,
    ) -> None:
        self.ids = list(ids)
        self.finish = finish
        self.error = error
        self.per_output = per_output
        self.hold_after = hold_after
        self.cached = cached
        self.readiness = Readiness(True, "ready")
        self.broken: OSError | None = None
        self._released = False
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    # ---- EngineBackend

    def submit(self, request: Submit, on_output: OnOutput) -> None:
        if self.broken is not None:
            raise self.broken
        with self._changed:
            self.submitted.append(request)
            self._changed.notify_all()
        thread = threading.Thread(target=self._run, args=(request, on_output), daemon=True)
        self._threads.append(thread)
        thread.start()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self.aborted.append(request_id)
            self._changed.notify_all()

    def stats(self) -> Sequence[Stats]:
        return ()

    def ready(self) -> Readiness:
        return self.readiness

    # ---- for tests

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until submissions and aborts make `condition` true; False after TIMEOUT_S."""
        with self._changed:
            return self._changed.wait_for(condition, TIMEOUT_S)

    def release(self) -> None:
        """Let held sequences go on."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let every sequence end and wait for it."""
        self.release()
        for thread in self._threads:
            thread.join(TIMEOUT_S)

    # ---- inside

    def _run(self, request: Submit, on_output: OnOutput) -> None:
        limit = request.params.max_tokens
        ids = self.ids[:limit]
        sent = 0
        first = True
        while first or sent < len(ids):
            if self._held(request, sent):
                return
            step = ids[sent : sent + self.per_output]
            sent += len(step)
            finish = self._finish(sent, len(ids)) if sent == len(ids) else None
            on_output(self._output(request, step, finish, first))
            first = False

    def _held(self, request: Submit, sent: int) -> bool:
        """Wait where the test wants it. Returns whether the sequence was aborted."""
        with self._changed:
            if self.hold_after is not None and sent >= self.hold_after:
                self._changed.wait_for(
                    lambda: self._released or request.request_id in self.aborted, TIMEOUT_S
                )
            return request.request_id in self.aborted

    def _finish(self, sent: int, limit: int) -> Literal["stop", "length", "error", "abort"]:
        return self.finish if sent == len(self.ids) else "length"

    def _output(
        self,
        request: Submit,
        step: list[int],
        finish: Literal["stop", "length", "error", "abort"] | None,
        first: bool,
    ) -> TokenOutput:
        params = request.params
        prompt_logprobs: list[TokenLogprob | None] | None = None
        if first and params.prompt_logprobs is not None:
            prompt_logprobs = [None]
            prompt_logprobs += [
                logprob_of(i, params.prompt_logprobs) for i in request.prompt_ids[1:]
            ]
        return TokenOutput(
            request_id=request.request_id,
            token_ids=step,
            logprobs=None
            if params.logprobs is None
            else [logprob_of(i, params.logprobs) for i in step],
            finish_reason=finish,
            error=self.error if finish == "error" else None,
            prompt_logprobs=prompt_logprobs,
            num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=self.cached if first else 0,
        )


def logprob_of(token_id: int, num_top: int) -> TokenLogprob:
    """-id/100; the most likely ones are the token itself and the ids behind it."""
    top = [(token_id + k, -(token_id + k) / 100) for k in range(num_top)]
    return TokenLogprob(token_id=token_id, logprob=-token_id / 100, top=top)
