"""What a worker does to itself when `shoal chaos` says so: a real signal, as a crash would send."""

from __future__ import annotations

import logging
import os
import signal
import subprocess

from experts.messages import Signal

logger = logging.getLogger(__name__)


def obey(order: Signal) -> None:
    """Die at once, or stand still for a while: a child process outside wakes this one again."""
    pid = os.getpid()
    logger.warning("chaos: %s pid %d", order.action, pid)
    if order.action == "kill":
        os.kill(pid, signal.SIGKILL)
    wake = ["/bin/sh", "-c", 'sleep "$1"; kill -CONT "$2"', "wake", str(order.duration_s), str(pid)]
    subprocess.Popen(wake, start_new_session=True)  # noqa: S603 - fixed command, two numbers
    os.kill(pid, signal.SIGSTOP)
