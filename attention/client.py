"""How an ingress calls an attention worker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pydantic import ValidationError

from attention.messages import (
    Abort,
    Message,
    Stats,
    StatsRequest,
    StepOutputs,
    Submit,
    TokenOutput,
    encode_message,
    parse_message,
)
from experts.channel.channel import (
    ChannelClosed,
    ChannelError,
    FrameError,
    connect,
)
from experts.channel.frame import Frame, Kind, Status
from experts.channel.questions import Questions

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 5.0


class AttentionClient:
    """One connection to one worker; thread-safe. Callbacks run in its reader thread: keep them
    short.

    Every submitted request gets outputs up to one with a finish_reason; "lost" when the connection
    ends, by whatever cause: the sequence can be replayed on another worker.
    """

    def __init__(self, endpoint: str, secret: bytes, timeout_s: float = 5.0):
        """Connect; raises ChannelError when nobody is there."""
        self._connection = connect(endpoint, secret, timeout_s=timeout_s)
        self._lock = threading.Lock()
        self._open: dict[str, Callable[[TokenOutput], None]] = {}
        self._questions: Questions[Stats] = Questions()
        self._lost = False
        self._reader = threading.Thread(target=self._read, name=f"from {endpoint}", daemon=True)
        self._reader.start()

    @property
    def closed(self) -> bool:
        return self._lost

    def submit(self, submit: Submit, on_output: Callable[[TokenOutput], None]) -> None:
        """Start a request. Never raises for a lost worker: on_output is told."""
        with self._lock:
            lost = self._lost
            if not lost:
                self._open[submit.request_id] = on_output
        if lost:
            on_output(_lost(submit.request_id))
        else:
            self._tell(submit)

    def abort(self, request_id: str) -> None:
        """Give a request up; its last output says "abort" unless it ended before."""
        self._tell(Abort(request_id=request_id))

    def stats(self, timeout_s: float = 5.0) -> Stats:
        """Ask the worker; raises ChannelError when it is gone or does not answer in time."""
        return self._questions.ask(lambda question: self._send(StatsRequest(), question), timeout_s)

    def close(self) -> None:
        """Leave; open requests end as "lost" here and are aborted at the worker."""
        self._connection.close()
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def _tell(self, message: Submit | Abort) -> None:
        try:
            self._send(message)
        except FrameError as error:
            self._refused_here(message, error)
        except ChannelError as error:
            logger.info("to %s: %s", self._connection.peer, error)

    def _send(self, message: Message, question: int = 0) -> None:
        """Raises FrameError; ChannelError, and then the reader ends everything that is open."""
        frame = Frame(Kind.CONTROL, request_id=question, body=encode_message(message))
        try:
            self._connection.send(frame, SEND_TIMEOUT_S)
        except ChannelError:
            self._connection.close()
            raise

    def _refused_here(self, message: Submit | Abort, error: FrameError) -> None:
        if isinstance(message, Submit):
            text = f"the request is too large to send: {error.field}"
            self._output(
                TokenOutput(request_id=message.request_id, finish_reason="error", error=text)
            )

    def _read(self) -> None:
        try:
            while True:
                self._take(self._connection.receive())
        except (ChannelError, FrameError, ValidationError) as error:
            logger.info("from %s: %s", self._connection.peer, error)
        finally:
            self._connection.close()
            self._end_all()

    def _take(self, frame: Frame) -> None:
        if frame.status != Status.OK:
            raise ChannelClosed(f"the worker refused a message: {frame.text}")
        message = parse_message(frame.body)
        if isinstance(message, StepOutputs):
            for output in message.outputs:
                self._output(output)
        elif isinstance(message, Stats):
            self._questions.answer(frame.request_id, message)

    def _output(self, output: TokenOutput) -> None:
        with self._lock:
            if output.finish_reason is None:
                on_output = self._open.get(output.request_id)
            else:
                on_output = self._open.pop(output.request_id, None)
        if on_output is None:
            return
        try:
            on_output(output)
        except Exception:  # a fault of one listener must not cut off the others
            logger.exception("listener of %s failed", output.request_id)

    def _end_all(self) -> None:
        with self._lock:
            self._lost = True
            open_ids = list(self._open)
        for request_id in open_ids:
            self._output(_lost(request_id))
        self._questions.fail_all(ChannelClosed("worker lost"))


def _lost(request_id: str) -> TokenOutput:
    return TokenOutput(request_id=request_id, finish_reason="lost")
