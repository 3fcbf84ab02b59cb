"""An engine that says what a test tells it to, from a thread of its own like a real one."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

from attention.messages import FinishReason, Stats, Submit, TokenLogprob, TokenOutput
from cluster.frontend.backend import Readiness

if TYPE_CHECKING:
    from attention.worker import AttentionWorker  # imports torch

OnOutput = Callable[[TokenOutput], None]
TIMEOUT_S = 60.0
"""How long a test waits for what must come: a machine may be many times slower than ours."""


class FakeEngine:
    """Implements cluster.frontend.backend.EngineBackend.

    Every sequence gets `ids` (or those that `ids` says for its Submit), `per_output` at a time, cut
    at its `max_tokens`. With `hold_after` it stops after so many tokens until `release()` or an
    abort. `lose(submit, attempt)` says behind how many tokens an attempt loses its worker (None:
    never); a worker that died says everything again a moment later, as if the news came late.
    While `parked` is set replays wait for `unpark()`. The tokens at `renormalised` are so.
    """

    def __init__(
        self,
        ids: Sequence[int] | Callable[[Submit], Sequence[int]],
        *,
        finish: FinishReason = "stop",
        error: str | None = None,
        per_output: int = 1,
        hold_after: int | None = None,
        cached: int = 0,
        lose: Callable[[Submit, int], int | None] = lambda submit, attempt: None,
        renormalised: Container[int] = (),
    ) -> None:
        self.ids_of = ids if callable(ids) else lambda submit: ids
        self.finish = finish
        self.error = error
        self.per_output = per_output
        self.hold_after = hold_after
        self.cached = cached
        self.lose = lose
        self.renormalised = renormalised
        self.parked = False
        self.replayed: list[Submit] = []
        self._parked: list[tuple[Submit, OnOutput]] = []
        self._attempts: Counter[str] = Counter()
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
        self._start(request, on_output)

    def replay(self, request: Submit, on_output: OnOutput) -> None:
        with self._changed:
            self.replayed.append(request)
            self._changed.notify_all()
            if self.parked:
                self._parked.append((request, on_output))
                return
        self._start(request, on_output)

    def _start(self, request: Submit, on_output: OnOutput) -> None:
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

    def unpark(self) -> None:
        """A worker is there again: replays that are not aborted go on."""
        with self._changed:
            self.parked = False
            waiting, self._parked = self._parked, []
        for request, on_output in waiting:
            if request.request_id not in self.aborted:
                self._start(request, on_output)

    def close(self) -> None:
        """Let every sequence end and wait for it."""
        self.release()
        for thread in self._threads:
            thread.join(TIMEOUT_S)

    # ---- inside

    def _run(self, request: Submit, on_output: OnOutput) -> None:
        whole = list(self.ids_of(request))
        ids = whole[: request.params.max_tokens]
        with self._changed:
            self._attempts[request.request_id] += 1
            lost_at = self.lose(request, self._attempts[request.request_id])
        sent, said = len(request.emitted_ids), list[TokenOutput]()
        while not (said and said[-1].finish_reason) and not self._held(request, sent):
            if lost_at is not None and sent >= min(lost_at, len(ids)):
                on_output(TokenOutput(request_id=request.request_id, finish_reason="lost"))
                for output in said:
                    on_output(output)
                return
            step = ids[sent : sent + self.per_output]
            sent += len(step)
            finish = None
            if sent >= len(ids) and lost_at is None:
                finish = self.finish if len(ids) == len(whole) else "length"
            said.append(self._output(request, step, finish, not said, sent))
            on_output(said[-1])

    def _held(self, request: Submit, sent: int) -> bool:
        """Wait where the test wants it. Returns whether the sequence was aborted."""
        with self._changed:
            if self.hold_after is not None and sent >= self.hold_after:
                self._changed.wait_for(
                    lambda: self._released or request.request_id in self.aborted, TIMEOUT_S
                )
            return request.request_id in self.aborted

    def _output(
        self,
        request: Submit,
        step: list[int],
        finish: FinishReason | None,
        first: bool,
        sent: int,
    ) -> TokenOutput:
        params = request.params
        prompt_logprobs: list[TokenLogprob | None] | None = None
        first = first and not request.emitted_ids
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
            error=self.error if finish in ("error", "unavailable") else None,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.cached if first else 0,
            renormalised=any(i in self.renormalised for i in range(sent - len(step), sent)),
        )


class TokenClock:
    """A service's clock, to be given to it as an observer too: it stands still until so many tokens
    have come and is `leap_s` further from then on. So a time limit passes behind a certain token,
    and however slow the machine is, not before."""

    def __init__(self, num_tokens: int, leap_s: float) -> None:
        self._num_left = num_tokens
        self._leap_s = leap_s

    def __call__(self) -> float:
        return 0.0 if self._num_left > 0 else self._leap_s

    def on_tokens(self, num_tokens: int, gap_s: float | None) -> None:
        self._num_left -= num_tokens

    def on_started(self, *_: object) -> None:
        """Nothing."""

    on_refused = on_kept = on_finished = on_started


def stop_behind(worker: AttentionWorker, num_tokens: int) -> None:
    """Its engine computes so many tokens from now on and no more, until the worker is closed."""
    engine, step = worker.engine, worker.engine.step
    last = engine.counters.generated_tokens + num_tokens

    def step_or_rest() -> list[TokenOutput]:
        if engine.counters.generated_tokens < last:
            return step()
        time.sleep(0.001)
        return []

    engine.step = step_or_rest  # type: ignore[method-assign]


def logprob_of(token_id: int, num_top: int) -> TokenLogprob:
    """-id/100; the most likely ones are the token itself and the ids behind it."""
    top = [(token_id + k, -(token_id + k) / 100) for k in range(num_top)]
    return TokenLogprob(token_id=token_id, logprob=-token_id / 100, top=top)
