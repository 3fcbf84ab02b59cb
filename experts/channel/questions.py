"""Questions to a peer that answers later, out of order or never; any thread may ask."""

import contextlib
import itertools
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Generic, TypeVar

from experts.channel.channel import ChannelTimeout

Answer = TypeVar("Answer")


class Questions(Generic[Answer]):
    """Those that are open, by request id; an answer that nobody waits for any more is ignored."""

    def __init__(self) -> None:
        self._open: dict[int, Future[Answer]] = {}
        self._ids = itertools.count(1)

    def ask(self, send: Callable[[int], None], timeout_s: float) -> Answer:
        """The answer to what `send(request id)` asks.

        Raises ChannelTimeout when none comes in time, what `send` raises, what `fail` was given.
        """
        question, answer = next(self._ids), Future[Answer]()
        self._open[question] = answer
        try:
            send(question)
            return answer.result(timeout_s)
        except TimeoutError:
            raise ChannelTimeout(f"no answer within {timeout_s} s") from None
        finally:
            del self._open[question]

    def answer(self, question: int, reply: Answer) -> None:
        future = self._open.get(question)
        if future is not None:
            with contextlib.suppress(InvalidStateError):  # answered twice
                future.set_result(reply)

    def fail(self, question: int, error: Exception) -> None:
        future = self._open.get(question)
        if future is not None:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)

    def fail_all(self, error: Exception) -> None:
        """The line is gone."""
        for question in list(self._open):
            self.fail(question, error)
