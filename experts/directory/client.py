"""A worker's line to the directory: registers, stays registered, keeps the newest snapshot.

One thread connects, registers with what the worker holds, pings and receives, for as long as the
worker lives; when the line breaks it starts over, with growing pauses. A second thread runs
`on_assign`, which may take minutes, so that loading never looks like death. Any thread may ask for
the cluster's load, give a command, or leave.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from pydantic import BaseModel

from experts.channel.channel import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    Connection,
    connect,
)
from experts.channel.frame import Frame, Status
from experts.channel.questions import Questions
from experts.messages import (
    Assign,
    ClusterLoadReply,
    Command,
    CommandRefused,
    Done,
    Holding,
    Leave,
    LoadReport,
    LoadRequest,
    Message,
    MessageError,
    MetricsReply,
    MetricsReport,
    MetricsRequest,
    Ping,
    Pong,
    Register,
    Released,
    Signal,
    Snapshot,
    decode,
    encode,
)
from experts.metrics import Sample
from experts.placement.space import ExpertKey

Answer = TypeVar("Answer", ClusterLoadReply, MetricsReply, Done)
Report = LoadReport | MetricsReport

logger = logging.getLogger(__name__)

MIN_PAUSE_S = 0.05
MAX_PAUSE_S = 2.0
CONNECT_TIMEOUT_S = 2.0
SEND_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 2.0
COMMAND_TIMEOUT_S = 15.0
NO_LINE_LIMIT_S = 2.0  # a worker that leaves waits no longer for a directory that is away
MISSED_PINGS = 3


class DirectoryClient:
    """Membership of one worker.

    `endpoint_source` is asked before every attempt to connect; it may raise, or name a new place.
    `on_snapshot(snapshot)` runs in the client's thread and must be quick.
    `on_assign(assign)` runs in a thread of its own, one at a time; of several that came meanwhile
    only the newest is run, and one that raises is run again after `retry_assign_s`. It should load
    and then call `report_holding`; during a long load also about once a second.
    `load_source()` gives an expert worker's load, `metrics_source()` any member's samples; with
    each ping they are told if they have changed. Both must be quick. Samples that cannot be had or
    told are left out: they cost no membership.
    `on_signal(signal)` carries out chaos, in the client's thread; without it signals are ignored.
    """

    def __init__(
        self,
        endpoint_source: Callable[[], str],
        secret: bytes,
        register: Register,
        on_snapshot: Callable[[Snapshot], None] | None = None,
        on_assign: Callable[[Assign], None] | None = None,
        load_source: Callable[[], LoadReport] | None = None,
        *,
        on_signal: Callable[[Signal], None] | None = None,
        metrics_source: Callable[[], Sequence[Sample]] | None = None,
        ping_interval_s: float = 1.0,
        retry_assign_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint_source = endpoint_source
        self._secret = secret
        self._register = register
        self._on_snapshot = on_snapshot
        self._on_assign = on_assign
        self._load_source = load_source
        self._on_signal = on_signal
        self._metrics_source = metrics_source
        self._ping_interval_s = ping_interval_s
        self._retry_assign_s = retry_assign_s
        self._clock = clock
        self._holds = tuple(register.holds)
        self._line_lock = threading.Lock()  # guards _line and _holds while one is told the other
        self._line: Connection | None = None
        self._no_line_since_s: float | None = clock()
        self._snapshot: Snapshot | None = None
        self._assign: Assign | None = None
        self._assigned: frozenset[ExpertKey] | None = None  # by the newest Assign, None: none yet
        self._assign_epoch = 0
        self._leaving = self._released = False
        self._questions: Questions[Message] = Questions()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._last_error = ""
        self._last_failure = ""  # of on_assign
        self._metrics_failed = False
        self._threads = [threading.Thread(target=self._run, name="directory-client", daemon=True)]
        if on_assign is not None:
            self._threads.append(
                threading.Thread(target=self._run_assigns, name="directory-assign", daemon=True)
            )

    def start(self) -> None:
        """Begin to connect; returns at once."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Leave the cluster: the directory sees the connection end.

        It takes that for a death unless it was told: by an expert worker's `leave`, by others here.
        """
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        with self._line_lock:
            if self._line is not None:
                if self._register.role != "experts":
                    with contextlib.suppress(ChannelError):
                        self._line.send(encode(Leave()), SEND_TIMEOUT_S)
                self._line.close()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(CLOSE_TIMEOUT_S)

    @property
    def snapshot(self) -> Snapshot | None:
        """The newest, also while the directory is away; None before the first."""
        return self._snapshot

    def wait_ready(self, timeout_s: float | None = None) -> Snapshot:
        """A snapshot that is ready. Raises TimeoutError that says how far things are."""
        snapshot = self._wait(lambda snapshot: snapshot.ready, timeout_s)
        if snapshot is not None:
            return snapshot
        newest = self._snapshot
        stage = newest.stage if newest else f"no directory yet: {self._last_error or 'connecting'}"
        raise TimeoutError(f"not ready after {timeout_s} s: {stage}")

    def wait_newer(self, version: int, timeout_s: float | None = None) -> Snapshot | None:
        """A snapshot newer than `version`, or None when none came in time."""
        return self._wait(lambda snapshot: snapshot.version > version, timeout_s)

    def report_holding(self, experts: Iterable[ExpertKey], epoch: int = 0) -> None:
        """Tell what the worker can compute now; remembered for the next registration.

        What a newer Assign wants dropped is not remembered. `epoch` is that of the Assign that was
        carried out. Never raises for a broken line: registering again tells it.
        """
        with self._line_lock:
            self._holds = self._certain(experts)
            if self._line is not None:
                with contextlib.suppress(ChannelError):
                    message = Holding(epoch=epoch, experts=self._holds)
                    self._line.send(encode(message), SEND_TIMEOUT_S)

    def ask_load(self, timeout_s: float = ASK_TIMEOUT_S) -> ClusterLoadReply:
        """What all expert workers computed lately. Raises ChannelError without an answer in time.

        Not from `on_snapshot`, whose thread receives the answer.
        """
        return self._ask_reply(LoadRequest(), ClusterLoadReply, timeout_s)

    def ask_metrics(self, timeout_s: float = ASK_TIMEOUT_S) -> MetricsReply:
        """The newest samples of all live members and of the directory. As `ask_load`."""
        return self._ask_reply(MetricsRequest(), MetricsReply, timeout_s)

    def command(self, message: Command, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Have the directory do something; returns its one line of text.

        Raises CommandRefused with its reason, ChannelError without an answer in time (it may have
        been carried out nevertheless). Not from `on_snapshot`.
        """
        return self._ask(message, Done, timeout_s).text

    def leave(self, timeout_s: float) -> bool:
        """Ask to be released and wait for it; True once others hold what this worker alone held.

        False when the time is over, or there was no directory for NO_LINE_LIMIT_S. Keep computing
        meanwhile, and for a moment after: callers may still have the last snapshot.
        """
        deadline_s = self._clock() + timeout_s
        with self._line_lock:
            self._leaving = True
            if self._line is not None:
                with contextlib.suppress(ChannelError):
                    self._line.send(encode(Leave()), SEND_TIMEOUT_S)
        with self._changed:
            while not self._released and not self._closing.is_set():
                end_s = deadline_s
                if self._no_line_since_s is not None:
                    end_s = min(end_s, self._no_line_since_s + NO_LINE_LIMIT_S)
                left_s = end_s - self._clock()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            return self._released

    def _ask_reply(self, message: BaseModel, answer_type: type[Answer], timeout_s: float) -> Answer:
        """A question that is no command: it fails when the answer is too large for a frame."""
        try:
            return self._ask(message, answer_type, timeout_s)
        except CommandRefused as error:
            raise ChannelError(str(error)) from None

    def _ask(self, message: BaseModel, answer_type: type[Answer], timeout_s: float) -> Answer:
        def send(question: int) -> None:
            with self._line_lock:
                if self._line is None:
                    raise ChannelClosed("no line to the directory")
                self._line.send(encode(message, question), min(timeout_s, SEND_TIMEOUT_S))

        reply = self._questions.ask(send, timeout_s)
        if not isinstance(reply, answer_type):
            raise MessageError(f"control message: {reply.type} is no answer to this question")
        return reply

    def _wait(self, test: Callable[[Snapshot], bool], timeout_s: float | None) -> Snapshot | None:
        def found() -> bool:
            return self._snapshot is not None and test(self._snapshot)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._closing.is_set(), timeout_s)
            return self._snapshot if found() else None

    # --- the client's thread ---

    def _run(self) -> None:
        pause_s = MIN_PAUSE_S
        while not self._closing.is_set():
            told = self._snapshot
            try:
                self._serve(self._join())
            except Exception as error:  # endpoint_source is foreign code, and nothing may end this
                self._note(f"{type(error).__name__}: {error}")
            finally:
                self._hang_up()
            pause_s = MIN_PAUSE_S if self._snapshot is not told else min(2 * pause_s, MAX_PAUSE_S)
            self._closing.wait(pause_s)

    def _note(self, text: str) -> None:
        """Log a failure, once while it repeats."""
        if text != self._last_error and not self._closing.is_set():
            logger.warning("line to the directory: %s", text)
        self._last_error = text

    def _join(self) -> Connection:
        line = connect(self._endpoint_source(), self._secret, timeout_s=CONNECT_TIMEOUT_S)
        newest = self._snapshot
        with self._line_lock:
            self._line = line
            register = self._register.model_copy(
                update={
                    "holds": self._holds,
                    "seen_epoch": max(newest.epoch if newest else 0, self._assign_epoch),
                    "seen_version": newest.version if newest else 0,
                    "seen_scale": newest.scale if newest else {},
                    "drained": bool(newest and self._register.worker_id in newest.drained),
                }
            )
            line.send(encode(register), SEND_TIMEOUT_S)
            if self._leaving:
                line.send(encode(Leave()), SEND_TIMEOUT_S)
        self._note_line(None)
        return line

    def _note_line(self, no_line_since_s: float | None) -> None:
        """For those who wait in `leave`."""
        with self._changed:
            self._no_line_since_s = no_line_since_s
            self._changed.notify_all()

    def _hang_up(self) -> None:
        with self._line_lock:
            if self._line is not None:
                self._line.close()
            self._line = None
        self._questions.fail_all(ChannelClosed("the line to the directory broke"))
        if self._no_line_since_s is None:
            self._note_line(self._clock())

    def _serve(self, line: Connection) -> None:
        """Receive and ping until the line breaks, which raises."""
        next_ping_s, num_unanswered = self._clock(), 0
        told: dict[str, Report] = {}
        while not self._closing.is_set():
            now_s = self._clock()
            if now_s >= next_ping_s:
                line.send(encode(Ping()), SEND_TIMEOUT_S)
                self._tell_news(line, told)
                num_unanswered += 1
                next_ping_s = now_s + self._ping_interval_s
            try:
                frame = line.receive(timeout_s=max(0.0, next_ping_s - now_s))
            except ChannelTimeout:
                if num_unanswered >= MISSED_PINGS:
                    raise ChannelTimeout("the directory is silent") from None
                continue
            num_unanswered = 0
            self._take(frame)

    def _tell_news(self, line: Connection, told: dict[str, Report]) -> None:
        """Send the reports that differ from those that this line was `told`, by type."""
        for report in (self._load_report(), self._metrics_report()):
            if report is not None and told.get(report.type) != report:
                line.send(encode(report), SEND_TIMEOUT_S)
                told[report.type] = report

    def _load_report(self) -> LoadReport | None:
        return None if self._load_source is None else self._load_source()

    def _metrics_report(self) -> MetricsReport | None:
        """None without samples; a failure is logged, once while it lasts."""
        if self._metrics_source is None:
            return None
        try:
            report = MetricsReport(samples=tuple(self._metrics_source()))
        except Exception:  # the owner's bug must not cost the membership
            if not self._metrics_failed:
                logger.exception("samples cannot be told")
            self._metrics_failed = True
            return None
        self._metrics_failed = False
        return report

    def _take(self, frame: Frame) -> None:
        if frame.status is not Status.OK:
            if not frame.request_id:
                raise MessageError(f"refused by the directory: {frame.text}")
            self._questions.fail(frame.request_id, CommandRefused(frame.text))
            return
        message = decode(frame)
        if isinstance(message, Snapshot):
            self._take_snapshot(message)
        elif isinstance(message, Assign):
            self._take_assign(message)
        elif isinstance(message, ClusterLoadReply | MetricsReply | Done):
            self._questions.answer(frame.request_id, message)
        elif isinstance(message, Released):
            with self._changed:
                self._released = self._leaving
                self._changed.notify_all()
        elif isinstance(message, Signal):
            self._take_signal(message)
        elif not isinstance(message, Pong):
            raise MessageError(f"control message: {message.type} is for the directory only")

    def _take_assign(self, assign: Assign) -> None:
        """From now on only what it names is held for certain: the rest may go at any moment."""
        with self._line_lock:
            self._assigned, self._assign_epoch = frozenset(assign.experts), assign.epoch
            self._holds = self._certain(self._holds)
        with self._changed:
            self._assign = assign
            self._changed.notify_all()

    def _certain(self, experts: Iterable[ExpertKey]) -> tuple[ExpertKey, ...]:
        kept = self._assigned
        return tuple(sorted(key for key in experts if kept is None or key in kept))

    def _take_signal(self, signal: Signal) -> None:
        if self._on_signal is None:
            logger.warning("signal %s ignored: nobody carries it out here", signal.action)
            return
        try:
            self._on_signal(signal)
        except Exception:  # the owner's bug must not cost the membership
            logger.exception("on_signal failed: %s", signal.action)

    def _take_snapshot(self, snapshot: Snapshot) -> None:
        with self._changed:
            self._snapshot = snapshot
            self._changed.notify_all()
        self._last_error = ""
        if self._on_snapshot is not None:
            try:
                self._on_snapshot(snapshot)
            except Exception:  # the owner's bug must not cost the membership
                logger.exception("on_snapshot failed at version %d", snapshot.version)

    # --- the thread of on_assign ---

    def _note_failure(self, assign: Assign, error: Exception) -> None:
        """Log it, once while it repeats."""
        text = f"{type(error).__name__}: {error}"
        if text != self._last_failure:
            logger.error("on_assign failed at epoch %d: %s", assign.epoch, text, exc_info=error)
        self._last_failure = text

    def _next_assign(self) -> Assign | None:
        with self._changed:
            self._changed.wait_for(lambda: self._assign or self._closing.is_set())
            assign, self._assign = self._assign, None
            return None if self._closing.is_set() else assign

    def _run_assigns(self) -> None:
        while (assign := self._next_assign()) is not None:
            try:
                if self._on_assign is not None:
                    self._on_assign(assign)
                self._last_failure = ""
            except Exception as error:  # it may be for a moment: again, unless a newer one came
                self._note_failure(assign, error)
                self._closing.wait(self._retry_assign_s)
                with self._changed:
                    self._assign = self._assign or assign
