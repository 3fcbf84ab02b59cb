"""Start a system in a process of its own, read what it reports, leave nothing behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from serving.memory import descendants

PR_SET_CHILD_SUBREAPER = 36
SIGTERM_EXIT = 128 + signal.SIGTERM
GRACE_S = 20.0
LOG_TAIL_LINES = 15
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
"""Taken from the environment: every system chooses its own threads."""


class SystemFailed(RuntimeError):
    """A system did not reach the end of its measurement; str() holds the end of its output."""


def exit_at_sigterm() -> None:
    """SIGTERM ends this process like an exception, so that `finally` and `with` are honoured."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM_EXIT))


def adopt_orphans() -> None:
    """Processes whose parent dies become ours, so that `end_all` finds every one."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_all() -> None:
    """End every process below this one: ask, wait, then kill."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for pid in descendants(os.getpid()):
            _signal(pid, sign)
        deadline = time.monotonic() + GRACE_S
        while descendants(os.getpid()) and time.monotonic() < deadline:
            _reap()
            time.sleep(0.05)
        _reap()


def free_port() -> int:
    """A port of this machine that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal(pid: int, sign: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it may have ended since the look
        os.kill(pid, sign)


def _reap() -> None:
    """Collect children that ended, adopted ones too."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass  # no child is left


def run_system(
    command: list[str],
    spec: dict[str, Any],
    timeout_s: float,
    on_message: Callable[[dict[str, Any]], None],
    environment: dict[str, str] | None = None,
) -> None:
    """Run `command --spec FILE --report FD`; `on_message` gets each JSON line it reports.

    Everything it started has ended when this returns. Raises SystemFailed.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in THREAD_VARIABLES}
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, _log(folder) as log:
        spec_path = os.path.join(folder, "spec.json")
        with open(spec_path, "w") as file:
            times = {"spawned_s": time.perf_counter(), "parent_pid": os.getpid()}
            json.dump(spec | times, file)
        read_end, write_end = os.pipe()
        process = subprocess.Popen(
            [*command, "--spec", spec_path, "--report", str(write_end)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end,),
            env=inherited | (environment or {}),
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        os.close(write_end)
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()
        try:
            with open(read_end) as report:
                for line in report:
                    on_message(json.loads(line))
            code = process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            code = None  # it reported everything but does not end by itself
        finally:
            timer.cancel()
            if process.poll() is None:
                process.terminate()
            end_all()
        if code not in (0, None):
            raise SystemFailed(f"exit code {code}; the end of its output:\n{_tail(log)}")


@contextmanager
def _log(folder: str) -> Iterator[Any]:
    with open(os.path.join(folder, "log"), "w+b") as file:
        yield file


def _tail(log: Any) -> str:
    log.seek(0)
    text = log.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
