"""The log files of all replicas on this machine as one stream, for the console of `shoal serve`."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import IO

REPLICAS = "replica_*.log"
POLL_S = 0.2


class LogFollower:
    """Copies every whole line that is added to the files of a folder, new files too."""

    def __init__(self, folder: Path, stream: IO[str]) -> None:
        self._folder = folder
        self._stream = stream
        self._read: dict[Path, int] = {}  # bytes of each file that were copied
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow-logs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Copy what is there by now, then end."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(POLL_S):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        for path in sorted(self._folder.glob(REPLICAS)):
            with contextlib.suppress(FileNotFoundError):  # it is being rotated
                self._stream.write(self._added(path))
        self._stream.flush()

    def _added(self, path: Path) -> str:
        """Whole lines behind what was read. A file that got shorter was rotated: the rest of the
        old one, then all of it."""
        start, rest = self._read.get(path, 0), b""
        if path.stat().st_size < start:
            rest, start = _whole_lines(path.with_name(f"{path.name}.1"), start), 0
        lines = _whole_lines(path, start)
        self._read[path] = start + len(lines)
        return (rest + lines).decode("utf-8", "replace")


def _whole_lines(path: Path, start: int) -> bytes:
    """Behind the first `start` bytes."""
    with path.open("rb") as file:
        file.seek(start)
        lines, newline, _ = file.read().rpartition(b"\n")
    return lines + newline
