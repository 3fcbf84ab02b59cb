"""Machine code of all CPU kernels, compiled once on a machine before its workers look for it.

Workers that find none on disk compile it themselves: half a minute of work, most of it again in
each of the four, all at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import IO

import attention.kernels
import experts.kernels
import router.kernels
from cluster.config import StartFailed
from experts.errors import one_line
from experts.kernels.code_folder import cache_folder

logger = logging.getLogger(__name__)

STAGE = "compiling CPU kernels, once on this machine"
NOTHING_KEPT = "no compiler, or no folder to keep its code in"


def is_missing() -> bool:
    """Whether workers would have to compile, and could keep the result for each other."""
    folder = cache_folder()
    if os.environ.get("SHOAL_KERNELS") == "torch" or folder is None:
        return False
    try:
        return not (folder / _mark()).exists()
    except ImportError:  # no compiler: torch computes
        return False


def compile_all() -> bool:
    """Compile or load everything in this process; whether workers will find it on disk."""
    from attention.compiled import entry_points
    from router.compiled import compile_kernels

    folder = cache_folder()
    if entry_points() is None or folder is None:
        return False
    compile_kernels()
    _write_mark(folder)
    return True


def _write_mark(folder: Path) -> None:
    """In place of those of earlier sources and compilers."""
    mark = folder / _mark()
    mark.touch()
    for other in folder.glob("complete-*"):
        if other != mark:
            other.unlink(missing_ok=True)


def _mark() -> str:
    """Name of the file that says "all is compiled": for this CPU, compiler and these sources, told
    apart as Numba's own index does it, by place and time of change."""
    import llvmlite.binding as llvm

    facts = [version("numba"), version("llvmlite"), sys.version]
    facts += [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    for package in (experts.kernels, router.kernels, attention.kernels):
        for file in sorted(Path(package.__path__[0]).glob("*.py")):
            state = file.stat()
            facts.append(f"{file} {state.st_mtime_ns} {state.st_size}")
    return f"complete-{hashlib.sha256('|'.join(facts).encode()).hexdigest()[:16]}"


class Compilation:
    """Compiles what is missing, in a process of its own: it can be stopped and its memory goes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._last_words = LastLine()
        self._stopped = False

    def start(self) -> None:
        """Begin, if anything is missing."""
        if is_missing():
            self._process = subprocess.Popen(  # noqa: S603 - this module
                # -P: a folder named `cluster` where the user stands is not ours.
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            self._last_words.read(self._process.stderr)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self) -> None:
        """Return when it has ended; what it leaves out the workers compile for themselves.

        Raises StartFailed after `stop`.
        """
        exit_code = self._process.wait() if self._process is not None else 0
        if self._stopped:
            raise StartFailed("stopped while it compiled")
        if exit_code != 0:
            reason = self._last_words.wait() or f"exit code {exit_code}"
            logger.warning("kernels are not compiled ahead: %s", one_line(reason))

    def stop(self) -> None:
        """End it at once."""
        self._stopped = True
        if self._process is not None and self.is_running:
            self._process.kill()
            self._process.wait()


class LastLine:
    """Reads a pipe to its end, so that no writer waits, and keeps the last line with text."""

    def __init__(self) -> None:
        self._line = ""
        self._thread: threading.Thread | None = None

    def read(self, pipe: IO[str] | None) -> None:
        """Read in the background, and close; None has no lines."""
        if pipe is None:
            return
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self._line = line.strip() or self._line

    def wait(self) -> str:
        """The line, once the pipe has ended."""
        if self._thread is not None:
            self._thread.join()
        return self._line


if __name__ == "__main__":
    sys.exit(None if compile_all() else NOTHING_KEPT)
