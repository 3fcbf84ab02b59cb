"""One running request: outputs of its sequences become Deltas; closing it aborts what is left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from attention.messages import TokenOutput
from cluster.errors import DeadlineExceeded, EngineFailed, Unavailable
from cluster.frontend.admission import Admission
from cluster.frontend.backend import EngineBackend
from cluster.frontend.choice import ChoiceText, Delta
from cluster.frontend.ledger import LedgerEntry, RequestLedger
from cluster.frontend.request import GenerateRequest
from cluster.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Usage:
    """Tokens of a request so far. n choices of one prompt count it once."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Generation:
    """Asynchronous iterator over the Deltas of all choices, in the order they come.

    Belongs to the event loop it was started on. The owner must call `close()`, also after an error
    and when it stops early: sequences still running are aborted at once. Closing twice is fine.
    """

    def __init__(
        self,
        request: GenerateRequest,
        tokenizer: Tokenizer,
        backend: EngineBackend,
        ledger: RequestLedger,
        admission: Admission,
        clock: Callable[[], float],
    ) -> None:
        """`admission` has counted the request's sequences; `close()` gives them back."""
        self.request = request
        self.usage = Usage(prompt_tokens=sum(len(p.ids) for p in request.prompts))
        self._backend = backend
        self._ledger = ledger
        self._admission = admission
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, TokenOutput]] = asyncio.Queue()
        self._ready: deque[Delta] = deque()
        self._choices = [ChoiceText(i, request, tokenizer) for i in range(request.num_sequences)]
        self._open = set(range(request.num_sequences))
        self._echo_due = set(self._open) if request.echo else set()

    async def start(self) -> None:
        """Submit every sequence. Raises Unavailable, and then nothing is left running."""
        try:
            for index in range(self.request.num_sequences):
                self._submit(index)
                await asyncio.sleep(0)  # hundreds of long prompts must not hold up other streams
        except OSError as error:
            self.close()
            logger.warning("no worker took request %s: %s", self.request.request_id, error)
            raise Unavailable(
                "No worker can take the request at the moment; try again.",
                code="no_worker",
                retry_after_s=1,
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Abort what still runs and forget the request."""
        for index in list(self._open):
            self._backend.abort(self._sequence_id(index))
            self._end(index)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Delta:
        """Raises DeadlineExceeded or EngineFailed; then the request is over."""
        while not self._ready:
            if not self._open:
                raise StopAsyncIteration
            index, output = await self._next_output()
            if index in self._open:
                self._handle(index, output)
        return self._ready.popleft()

    # ---- from the engine

    def _submit(self, index: int) -> None:
        prompt, params = self.request.sequence(index)
        entry = LedgerEntry(self._sequence_id(index), prompt.ids, params, self.request.deadline)
        submission = self._ledger.open(entry)
        self._backend.submit(submission, lambda output: self._on_output(index, output))

    def _on_output(self, index: int, output: TokenOutput) -> None:
        """Runs in a thread of the back end. A loop that is gone has nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))

    async def _next_output(self) -> tuple[int, TokenOutput]:
        deadline = self.request.deadline
        if not self._outputs.empty():
            return self._outputs.get_nowait()
        if deadline is None:
            return await self._outputs.get()
        try:
            async with asyncio.timeout(deadline - self._clock()):
                return await self._outputs.get()
        except TimeoutError:
            self._fail_deadline()

    def _handle(self, index: int, output: TokenOutput) -> None:
        self._ledger.record(self._sequence_id(index), output.token_ids)
        if output.finish_reason in ("error", "abort"):
            self._fail(index, output)
        choice = self._choices[index]
        self._count(index, output)
        if index in self._echo_due:
            self._echo_due.discard(index)
            prompt, _ = self.request.sequence(index)
            self._ready.append(choice.echo(prompt, output.prompt_logprobs))
        delta = choice.push(output)
        if delta.text or delta.token_ids or delta.finish_reason:
            self._ready.append(delta)
        if choice.finished:
            if output.finish_reason is None:  # a stop string, which the engine knows nothing of
                self._backend.abort(self._sequence_id(index))
            self._end(index)

    def _count(self, index: int, output: TokenOutput) -> None:
        self.usage.completion_tokens += len(output.token_ids)
        if index % self.request.num_choices == 0:
            self.usage.cached_tokens += output.num_cached_tokens

    # ---- ends

    def _end(self, index: int) -> None:
        self._open.discard(index)
        self._ledger.close(self._sequence_id(index))
        self._admission.leave(1)

    def _fail(self, index: int, output: TokenOutput) -> NoReturn:
        if self.request.deadline is not None and self._clock() >= self.request.deadline:
            self._fail_deadline()
        self._end(index)
        self.close()
        reason = output.error or "the request was aborted"
        raise EngineFailed(f"The engine could not finish the request: {reason}.")

    def _fail_deadline(self) -> NoReturn:
        self.close()
        raise DeadlineExceeded("The request's time limit passed before it was finished.")

    def _sequence_id(self, index: int) -> str:
        return f"{self.request.request_id}-{index}"
