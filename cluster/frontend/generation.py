"""One running request: outputs of its sequences become Deltas; closing it aborts what is left."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self

from attention.messages import TokenOutput
from cluster.errors import DeadlineExceeded, EngineFailed, ShoalError, Unavailable
from cluster.frontend.admission import Admission
from cluster.frontend.backend import EngineBackend, Readiness
from cluster.frontend.choice import ChoiceText, Delta
from cluster.frontend.ledger import RequestLedger
from cluster.frontend.observation import Observation, Outcome, Usage, code_of
from cluster.frontend.observer import Timing
from cluster.frontend.replay import Arrived, SequenceRuns
from cluster.frontend.request import GenerateRequest
from cluster.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

RETRY_WORKER_S = 1
RETRY_EXPERTS_S = 5
"""Starting an expert worker and loading its experts takes seconds."""


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


class Generation:
    """Asynchronous iterator over the Deltas of all choices, in the order they come.

    Belongs to the event loop it was started on. The owner must call `close()`, or use it as a
    context, also after an error and when it stops early: sequences still running are aborted at
    once. Closing twice is fine. The observation is finished once, whatever happens.
    """

    def __init__(
        self,
        request: GenerateRequest,
        tokenizer: Tokenizer,
        backend: EngineBackend,
        ledger: RequestLedger,
        admission: Admission,
        observation: Observation,
        clock: Callable[[], float],
    ) -> None:
        """`admission` has counted the request's sequences; `close()` gives them back."""
        self.request = request
        self.usage = Usage(prompt_tokens=sum(len(p.ids) for p in request.prompts))
        self.renormalised = False
        """Some expert was left out for a token so far."""
        self.timing = Timing()
        """Of the sequences that have ended."""
        self.observation = observation
        self._backend = backend
        self._admission = admission
        self._clock = clock
        self._runs = SequenceRuns(request, backend, ledger, clock, observation.span.context)
        self._ready: deque[Delta] = deque()
        self._choices = [ChoiceText(i, request, tokenizer) for i in range(request.num_sequences)]
        self._open = set(range(request.num_sequences))
        self._finish_reasons: list[str] = []
        self._token_s: list[float] = []
        self._echo_due = set(self._open) if request.echo else set()
        self._renormalised_due: set[int] = set()  # choices whose next Delta has to tell it

    async def start(self) -> None:
        """Submit every sequence. Raises Unavailable, and then nothing is left running."""
        self.observation.admit(self.request)
        try:
            for index in range(self.request.num_sequences):
                self._runs.start(index)
                await asyncio.sleep(0)  # hundreds of long prompts must not hold up other streams
        except OSError as error:
            logger.warning("no worker took request %s: %s", self.request.request_id, error)
            self._fail(_no_worker())
        except BaseException as error:
            self.close(error)
            raise

    def close(self, error: BaseException | None = None) -> None:
        """Abort what still runs and forget the request. error: why its owner stops, if not because
        the client left or all is told."""
        if isinstance(error, Exception) and not isinstance(error, ClientGone):
            self._close("error", code_of(error))
        else:
            self._close("cancelled" if self._open else "ok")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Delta:
        """Raises DeadlineExceeded, Unavailable or EngineFailed; then the request is over."""
        while not self._ready:
            if not self._open:
                raise StopAsyncIteration
            self._handle(*await self._next_output())
        return self._ready.popleft()

    # ---- from the engine

    async def _next_output(self) -> Arrived:
        deadline = self.request.deadline
        if deadline is None:
            return await self._runs.next_output()
        try:
            async with asyncio.timeout(deadline - self._clock()):
                return await self._runs.next_output()
        except TimeoutError:
            self._fail(self._too_late())

    def _handle(self, index: int, output: TokenOutput, arrived_s: float) -> None:
        if output.finish_reason in ("error", "abort", "unavailable"):
            self._end(index)
            self._fail(self._error_of(output))
        choice = self._choices[index]
        self._count(index, output, arrived_s)
        if index in self._echo_due:
            self._echo_due.discard(index)
            prompt, _ = self.request.sequence(index)
            self._ready.append(choice.echo(prompt, output.prompt_logprobs))
        delta = choice.push(output)
        if delta.text or delta.token_ids or delta.finish_reason:
            delta.renormalised = index in self._renormalised_due
            self._renormalised_due.discard(index)
            self._ready.append(delta)
        if choice.finished:
            self._finish_reasons.append(delta.finish_reason or "")
            self._end(index)
            if output.finish_reason is None:  # a stop string, which the engine knows nothing of
                self._runs.abort(index)
            if not self._open:
                self.observation.last_token()

    def _count(self, index: int, output: TokenOutput, arrived_s: float) -> None:
        if output.token_ids:
            self.observation.tokens(index, len(output.token_ids), arrived_s)
        self.usage.completion_tokens += len(output.token_ids)
        if index % self.request.num_choices == 0:
            self.usage.cached_tokens += output.num_cached_tokens
        if output.renormalised:
            self.renormalised = True
            self._renormalised_due.add(index)

    # ---- ends

    def _end(self, index: int) -> None:
        self._open.discard(index)
        timing, num_later = self._runs.end(index), self._choices[index].num_tokens - 1
        if num_later > 0:
            self._token_s.append(timing.decode_s / num_later)
        self.timing = timing.beside(self.timing)
        self._admission.leave(1)

    def _fail(self, error: ShoalError) -> NoReturn:
        self._close("error", error.code)
        raise error from None

    def _close(self, outcome: Outcome, code: str = "") -> None:
        for index in list(self._open):
            self._end(index)
            self._runs.abort(index)
        self.observation.finish(
            outcome,
            self.usage,
            self.timing,
            finish_reasons=self._finish_reasons,
            token_s=self._token_s,
            num_replays=self._runs.num_replays,
            code=code,
        )

    def _error_of(self, output: TokenOutput) -> ShoalError:
        """What a sequence that did not finish means for the whole request."""
        if output.finish_reason == "unavailable":
            if output.error is None:
                return _no_worker()
            return _experts_unavailable(output.error)
        if self.request.deadline is not None and self._clock() >= self.request.deadline:
            return self._too_late()
        reason = output.error or "the request was aborted"
        return EngineFailed(f"The engine could not finish the request: {reason}.")

    def _too_late(self) -> ShoalError:
        """The time limit passed: through the request's own length, or while a part was away."""
        state = Readiness(*self._backend.ready())
        if state.missing == "experts":
            return _experts_unavailable(state.stage)
        if state.missing == "attention":
            return _no_worker()
        return DeadlineExceeded("The request's time limit passed before it was finished.")


def _no_worker() -> Unavailable:
    return Unavailable(
        "No worker can take the request at the moment; try again.",
        code="no_worker",
        retry_after_s=RETRY_WORKER_S,
    )


def _experts_unavailable(reason: str) -> Unavailable:
    return Unavailable(
        f"Experts that the request needs are away ({reason}); try again.",
        code="experts_unavailable",
        retry_after_s=RETRY_EXPERTS_S,
    )
