"""A server: proves the secret with each newcomer, then answers it in a thread of its own."""

import contextlib
import hmac
import logging
import socket
import threading
import time
from collections.abc import Callable

from experts.channel import inproc
from experts.channel.connection import (
    ChannelError,
    ChannelRefused,
    Connection,
    Handler,
    ServerFlow,
)
from experts.channel.counters import ChannelCounters
from experts.channel.dial import tune
from experts.channel.endpoint import parse_endpoint
from experts.channel.establish import establish
from experts.channel.frame import (
    DEFAULT_LIMITS,
    Frame,
    FrameError,
    FrameLimits,
    Status,
    reply_to,
)
from experts.channel.handshake import Terms, serve_handshake
from experts.channel.listener import SocketFile, open_listener, peer_name
from experts.channel.memory import ChannelMemory
from experts.channel.offer import check_available, usable_memory
from experts.channel.stream import StreamConnection

logger = logging.getLogger(__name__)

MAX_HALF_OPEN = 32  # connections that have not proved the secret; more wait in the backlog
REPLY_TIMEOUT_S = 10.0  # a client that does not read its replies for so long is cut off
ACCEPT_PAUSE_S = 0.1  # after a failed accept (out of descriptors)
Callback = Callable[[Connection], None]


class Server:
    """Serves one endpoint.

    `handler(frame, connection)` runs in the connection's own thread (inproc: in the sender's), one
    frame at a time. What it returns is sent back; None means answered later through
    `connection.send`. What it raises becomes a FAILED result with one line of text. `on_open` runs
    before a connection's first frame (if it raises, the connection is closed), `on_close` after its
    last.
    """

    def __init__(
        self,
        endpoint: str,
        handler: Handler,
        secret: bytes,
        limits: FrameLimits = DEFAULT_LIMITS,
        credits: int = 32,
        name: str = "channel",
        on_open: Callback | None = None,
        on_close: Callback | None = None,
        counters: ChannelCounters | None = None,
        memory: ChannelMemory | None = None,
    ) -> None:
        if not secret:
            raise ValueError("a channel needs a secret")
        self.limits = limits
        self.granted_credits = credits
        self.counters = counters or ChannelCounters()
        self._endpoint = parse_endpoint(endpoint)
        self._handler = handler
        self._secret = secret
        self._memory = memory or ChannelMemory()
        self._name = name
        self._on_open = on_open
        self._on_close = on_close
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._newcomers: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closing = threading.Event()
        self._half_open = threading.Semaphore(MAX_HALF_OPEN)
        self._listener: socket.socket | None = None
        self._file: SocketFile | None = None

    @property
    def endpoint(self) -> str:
        """Where clients connect; after start() with the port that tcp got."""
        return str(self._endpoint)

    @property
    def connections(self) -> tuple[Connection, ...]:
        """Those open now."""
        with self._lock:
            return tuple(self._connections)

    def start(self) -> None:
        """Listen. Returns at once. Raises ChannelError when the endpoint is taken or not usable."""
        if self._endpoint.scheme == "inproc":
            inproc.register(self._endpoint.address, self)
            return
        check_available(self._endpoint)
        self._listener, self._endpoint = open_listener(self._endpoint)
        self._file = SocketFile(self._endpoint)
        self._spawn("accept", self._accept_loop, self._listener)

    def close(self, timeout_s: float = 5.0) -> None:
        """Close every connection and join every thread, within `timeout_s` in all."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._endpoint.scheme == "inproc":
            inproc.unregister(self._endpoint.address, self)
        if self._listener is not None and self._file is not None:
            self._file.remove()
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            self._half_open.release()
        self._cut_newcomers()
        for connection in self.connections:
            connection.close()
        self._join(time.monotonic() + timeout_s)

    def _cut_newcomers(self) -> None:
        with self._lock:
            for sock in self._newcomers:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _join(self, deadline_s: float) -> None:
        with self._lock:
            threads = self._threads - {threading.current_thread()}
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        stuck = [thread.name for thread in threads if thread.is_alive()]
        if stuck:
            logger.warning("handlers still run after close: %s", ", ".join(stuck))

    # --- threads of a socket endpoint ---

    def _spawn(
        self, label: str, target: Callable[[socket.socket], None], sock: socket.socket
    ) -> None:
        def run() -> None:
            try:
                target(sock)
            finally:
                sock.close()

        thread = threading.Thread(target=run, name=f"{self._name}-{label}", daemon=True)
        try:
            with self._lock:
                thread.start()
                # one that has ended may leave, one that is about to end has to be joined
                self._threads = {other for other in self._threads if other.is_alive()} | {thread}
        except RuntimeError:  # no more threads
            sock.close()
            raise

    def _accept_loop(self, listener: socket.socket) -> None:
        while True:
            self._half_open.acquire()
            if self._closing.is_set():
                return
            try:
                sock, _ = listener.accept()
                self._spawn(peer_name(sock), self._serve, sock)
            except (OSError, RuntimeError) as error:  # out of descriptors or threads: others leave
                self._half_open.release()
                if not self._closing.wait(ACCEPT_PAUSE_S):
                    logger.warning("%s cannot accept: %s", self.endpoint, error)

    def _serve(self, sock: socket.socket) -> None:
        connection = self._admit(sock)
        if connection is None:
            return
        try:
            self.opened(connection)
            while not connection.closed:
                self.answer(connection.receive(), connection)
        except (ChannelError, FrameError) as error:
            logger.debug("%s: %s", connection.peer, error)
        finally:
            connection.close()
            self.ended(connection)

    def _admit(self, sock: socket.socket) -> StreamConnection | None:
        """The handshake; None for those who fail it."""
        peer = peer_name(sock)
        with self._lock:
            self._newcomers.add(sock)
        try:
            tune(sock)
            offered = usable_memory(self._endpoint, sock, self._memory)
            mine = Terms(self.limits, self.granted_credits, offered)
            theirs = serve_handshake(sock, self._secret, mine)
            flow = ServerFlow(self.granted_credits)
            return establish(
                sock, peer, self._endpoint, flow, mine, theirs, self._memory, self.counters
            )
        except ChannelRefused as error:
            logger.warning("%s refused: %s", peer, error)
            self.counters.auth_failure()
            return None
        except OSError as error:
            logger.info("%s left in the handshake: %s", peer, error)
            self.counters.bad_frame("handshake")
            return None
        finally:
            self._half_open.release()
            with self._lock:
                self._newcomers.discard(sock)

    # --- what both kinds of endpoint need (inproc.Host) ---

    def accepts(self, secret: bytes) -> bool:
        return hmac.compare_digest(secret, self._secret)

    def opened(self, connection: Connection) -> None:
        with self._lock:
            self._connections.add(connection)
        if self._closing.is_set() or not self._notify(self._on_open, connection):
            connection.close()

    def ended(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
        self._notify(self._on_close, connection)

    def _notify(self, callback: Callback | None, connection: Connection) -> bool:
        """Whether the callback went well."""
        if callback is None:
            return True
        try:
            callback(connection)
        except Exception:
            self.counters.handler_error()
            logger.exception("callback of %s failed for %s", self.endpoint, connection.peer)
            return False
        return True

    def answer(self, frame: Frame, connection: Connection) -> None:
        """Call the handler and send what it returns."""
        reply = self._handle(frame, connection)
        if reply is None:
            return
        try:
            connection.send(reply, REPLY_TIMEOUT_S)
        except FrameError as error:
            self.counters.handler_error()
            logger.error("handler of %s made a bad reply: %s", self.endpoint, error)
            failed = reply_to(frame, status=Status.FAILED, text=f"bad reply: {error}")
            connection.send(failed, REPLY_TIMEOUT_S)

    def _handle(self, frame: Frame, connection: Connection) -> Frame | None:
        try:
            return self._handler(frame, connection)
        except Exception as error:
            self.counters.handler_error()
            logger.exception("handler of %s failed", self.endpoint)
            text = f"{type(error).__name__}: {error}"
            return reply_to(frame, status=Status.FAILED, text=text)
