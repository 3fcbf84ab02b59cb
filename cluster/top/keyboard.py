"""Single keys of the terminal, heard as they are pressed."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
import tty
from typing import Any

QUIT = "q"
NAMES = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\x1b[H": "home",
    b"\x1b[F": "end",
}
_KEY = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)


class Keyboard:
    """Keys without Enter and without an echo. Without a terminal as input no key is ever pressed.

    Ctrl-C stays a signal; Ctrl-Z is none, as it would leave the shell with our screen.
    """

    def __init__(self) -> None:
        self._file = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before: list[Any] = []

    def __enter__(self) -> Keyboard:
        if self._file is not None:
            self._before = termios.tcgetattr(self._file)
            tty.setcbreak(self._file)
            attributes = termios.tcgetattr(self._file)
            attributes[tty.CC][termios.VSUSP] = b"\0"
            termios.tcsetattr(self._file, termios.TCSANOW, attributes)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            termios.tcsetattr(self._file, termios.TCSAFLUSH, self._before)

    def keys(self, timeout_s: float) -> list[str]:
        """What is pressed within the time, each a character or one of NAMES."""
        if self._file is None:
            time.sleep(timeout_s)
            return []
        if not select.select([self._file], [], [], timeout_s)[0]:
            return []
        data = os.read(self._file, 256)
        if not data:
            return [QUIT]  # the terminal is gone
        return [NAMES.get(key, key.decode("ascii", "ignore")) for key in _KEY.findall(data)]
