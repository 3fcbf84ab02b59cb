"""The connection to one attention worker, with a thread that sends: nobody else waits for a peer
that has stopped reading."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from attention.client import AttentionClient
from attention.messages import Stats, Submit, TokenOutput

logger = logging.getLogger(__name__)

OnOutput = Callable[[TokenOutput], None]


class AttentionLine:
    """Sends in the order of the calls. Every submitted sequence gets a last output, whatever
    happens: "lost" for those that a broken connection left open or unsent."""

    def __init__(self, worker_id: str, client: AttentionClient) -> None:
        self.worker_id = worker_id
        self.open_tokens: dict[str, int] = {}  # request id -> tokens it may hold in the end
        self._client = client
        self._outbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name=f"to {worker_id}", daemon=True)
        self._sender.start()

    @property
    def load(self) -> int:
        """Tokens of the open sequences."""
        return sum(self.open_tokens.values())

    @property
    def closed(self) -> bool:
        """The connection has ended, for good."""
        return self._client.closed

    def submit(self, submit: Submit, on_output: OnOutput) -> None:
        """Have a sequence sent; returns at once. Not after `close`."""
        self._outbox.put(lambda: self._client.submit(submit, on_output))

    def abort(self, request_id: str) -> None:
        """Have an abort sent, behind the sequence itself."""
        self._outbox.put(lambda: self._client.abort(request_id))

    def stats(self, timeout_s: float) -> Stats:
        """Ask the worker; blocks. Raises ChannelError when it is gone or silent."""
        return self._client.stats(timeout_s)

    def close(self) -> None:
        """End the connection; open sequences are told "lost" before this returns."""
        self._client.close()
        self._outbox.put(None)
        self._sender.join()

    def _send(self) -> None:
        while (work := self._outbox.get()) is not None:
            try:
                work()
            except Exception:  # what comes behind it must still be sent
                logger.exception("to %s: not sent", self.worker_id)
