"""What the command line shows while something takes long, and how it hears Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LOG_PERIOD_S = 5.0
POLL_PERIOD_S = 0.1

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


@dataclass(frozen=True)
class Stage:
    """How far a start has come; `total` 0 means not countable."""

    text: str
    done: int = 0
    total: int = 0


class Stages:
    """Shows stages: a live bar on a terminal, else a line at each change and every 5 s."""

    def __init__(self) -> None:
        self._live = stderr.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=stderr,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None)
        self._started = time.monotonic()
        self._last = ("", 0.0)

    def __enter__(self) -> Stages:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._progress.stop()

    def show(self, stage: Stage) -> None:
        """Report where the start is now; cheap to call often."""
        if self._live:
            self._progress.update(
                self._task,
                description=stage.text,
                completed=stage.done,
                total=stage.total or None,
            )
            return
        text, at = self._last
        now = time.monotonic()
        if stage.text != text or now - at >= LOG_PERIOD_S:
            stderr.print(f"{now - self._started:5.1f} s  {stage.text}", markup=False)
            self._last = (stage.text, now)

    def wait(self, poll: Callable[[], Stage | None], timeout_s: float) -> bool:
        """Show what `poll` returns until it returns None; False when the time is up."""
        deadline = time.monotonic() + timeout_s
        while (stage := poll()) is not None:
            self.show(stage)
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_PERIOD_S)
        return True


class StopSignals:
    """First Ctrl-C (or SIGTERM): `first` is set. A second one: `second` is set."""

    def __init__(self) -> None:
        self.first = threading.Event()
        self.second = threading.Event()

    def arm(self) -> None:
        """Handle the signals from here on. Again after starting Ray, whose own handler of SIGTERM
        would abort the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def interrupt_on_first(self) -> None:
        """From here on the first signal raises KeyboardInterrupt, SystemExit(143) if it is SIGTERM,
        for code that waits for input."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.arm()
        self._handle(number, frame)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        (self.second if self.first.is_set() else self.first).set()


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Listen for SIGINT and SIGTERM until the end of the block."""
    old: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signals = StopSignals()
    signals.arm()
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
