"""An attention worker: an engine in a thread of its own behind a channel."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from attention.build import build_engine
from attention.config import AttentionConfig
from attention.messages import (
    Abort,
    Message,
    StatsRequest,
    StepOutputs,
    Submit,
    TokenOutput,
    encode_message,
    parse_message,
)
from attention.tracing import Tracer
from experts.channel.channel import ChannelError, Connection, FrameError, Server
from experts.channel.frame import Frame, Kind, Status, reply_to
from experts.channel.outbox import Outbox
from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from router.client import MoeClient

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 5.0
"""An ingress that reads nothing for so long is cut off."""
CLOSE_TIMEOUT_S = 5.0


class _Peer(NamedTuple):
    """An open connection: the how manyth it was, and the way out to it."""

    number: int
    outbox: Outbox


class AttentionWorker:
    """Serves one engine. Handlers run in the connections' threads and only leave work in an inbox;
    the engine thread does it between steps and sleeps when there is none."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        moe: MoeClient,
        config: AttentionConfig,
        name: str = "attention",
        device: ComputeDevice | None = None,
        tracer: Tracer | None = None,
    ):
        """moe is used by the engine thread only; tracer: None without traces. Raises
        CheckpointError, ValueError."""
        self.engine = build_engine(checkpoint, moe, config, device, tracer)
        self._name = name
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._owners: dict[str, Connection] = {}  # request id -> who gets its outputs
        self._peers: dict[Connection, _Peer] = {}
        self._numbers = itertools.count()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._server: Server | None = None

    # --- life ---

    def start(self, endpoint: str, secret: bytes) -> str:
        """Serve until `close`; returns the endpoint with the port it got. Raises ChannelError."""
        self._server = Server(
            endpoint,
            self.handle,
            secret,
            name=self._name,
            on_open=self._connection_opened,
            on_close=self._connection_lost,
        )
        self._server.start()
        self._thread = threading.Thread(target=self._loop, name=f"{self._name}-engine", daemon=True)
        self._thread.start()
        return self._server.endpoint

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs; without it nothing is served any more."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """End the connections, so that what is open is lost and goes elsewhere at once, then stop
        after the step under way; one that waits for experts is not waited for."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._server is not None:
            self._server.close()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    # --- connections' threads ---

    def handle(self, frame: Frame, connection: Connection) -> Frame | None:
        """Take a Submit or Abort in, answer a StatsRequest. A bad body raises ValidationError."""
        if frame.kind != Kind.CONTROL:
            return reply_to(frame, status=Status.FAILED, text=f"not for here: {frame.kind.name}")
        message = parse_message(frame.body)
        if isinstance(message, StatsRequest):
            return _frame(self.engine.stats(), frame.request_id)
        if isinstance(message, Submit):
            self._leave_work(lambda: self._submit(message, connection))
        elif isinstance(message, Abort):
            self._leave_work(lambda: self._abort(message.request_id, connection))
        else:
            return reply_to(frame, status=Status.FAILED, text=f"not for here: {message.type}")
        return None

    def _connection_opened(self, connection: Connection) -> None:
        self._peers[connection] = _Peer(next(self._numbers), Outbox(connection, SEND_TIMEOUT_S))

    def _connection_lost(self, connection: Connection) -> None:
        self._leave_work(lambda: self._abort_all(connection))

    def _leave_work(self, work: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(work)
            self._wake.notify_all()

    # --- engine thread ---

    def _loop(self) -> None:
        try:
            while self._receive():
                self._deliver(self.engine.step())
        except Exception:  # a fault of ours: clients must see the end, not silence
            logger.exception("%s: engine thread failed", self._name)
            if self._server is not None:
                self._server.close()

    def _receive(self) -> bool:
        """Do what came in; sleep while there is nothing to do. False when closing."""
        with self._wake:
            while not (self._inbox or self._closing or self.engine.has_work):
                self._wake.wait()
            work = list(self._inbox)
            self._inbox.clear()
        for item in work:
            item()
        return not self._closing

    def _submit(self, submit: Submit, connection: Connection) -> None:
        """Start a request. One that is open over an older connection is replaced without a word:
        this is its replay, so that connection was lost, only its end is not noticed yet. An older
        one replaces nothing: the same id may still lie in it, unread when this worker stood still.
        """
        request_id = submit.request_id
        if connection not in self._peers:  # it has ended
            return
        owner = self._owners.get(request_id)
        if owner is not None and self._peers[connection].number <= self._peers[owner].number:
            text = "the request id is in use"
            refused = TokenOutput(request_id=request_id, finish_reason="error", error=text)
            self._send(connection, [refused])
            return
        if owner is not None:
            self._end(request_id)
        self._owners[request_id] = connection
        self.engine.add(submit)

    def _abort(self, request_id: str, connection: Connection) -> None:
        if self._owners.get(request_id) is connection:
            last = self._end(request_id)
            if last is not None:
                self._send(connection, [last])

    def _abort_all(self, connection: Connection) -> None:
        for request_id, owner in list(self._owners.items()):
            if owner is connection:
                self._end(request_id)
        self._peers.pop(connection, None)

    def _end(self, request_id: str) -> TokenOutput | None:
        """Forget a request; its last output, which nobody else sends."""
        self._owners.pop(request_id, None)
        return self.engine.abort(request_id)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """One frame a connection."""
        by_owner: dict[Connection, list[TokenOutput]] = {}
        for output in outputs:
            by_owner.setdefault(self._owners[output.request_id], []).append(output)
            if output.finish_reason is not None:
                del self._owners[output.request_id]
        for connection, theirs in by_owner.items():
            self._send(connection, theirs)

    def _send(self, connection: Connection, outputs: list[TokenOutput]) -> None:
        peer = self._peers.get(connection)
        if peer is None or connection.closed:
            return
        try:
            peer.outbox.post(_frame(StepOutputs(outputs=outputs)))
        except ChannelError as error:
            logger.warning("%s: outputs to %s not sent: %s", self._name, connection.peer, error)
            connection.close()
        except FrameError as error:
            self._send_one_by_one(connection, outputs, error)

    def _send_one_by_one(
        self, connection: Connection, outputs: list[TokenOutput], error: FrameError
    ) -> None:
        """Too much for a frame (logprobs of a long prompt): the one that is too large must fail."""
        if len(outputs) > 1:
            for output in outputs:
                self._send(connection, [output])
            return
        request_id = outputs[0].request_id
        logger.warning("%s: output of %s refused: %s", self._name, request_id, error)
        self._end(request_id)
        failed = TokenOutput(
            request_id=request_id, finish_reason="error", error="the answer is too large to send"
        )
        self._send(connection, [failed])


def _frame(message: Message, request_id: int = 0) -> Frame:
    return Frame(Kind.CONTROL, request_id=request_id, body=encode_message(message))
