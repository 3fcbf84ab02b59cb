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
from importlib.metadata import version
from pathlib import Path

import attention.kernels
import experts.kernels
import router.kernels
from cluster.config import StartFailed

logger = logging.getLogger(__name__)

STAGE = "compiling CPU kernels, once on this machine"


def is_missing() -> bool:
    """Whether workers would have to compile, and could keep the result for each other."""
    from experts.kernels.runtime import cache_folder

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
    from experts.kernels.runtime import cache_folder
    from router.compiled import compile_kernels

    folder = cache_folder()
    if entry_points() is None or folder is None:
        return False
    compile_kernels()
    (folder / _mark()).touch()
    return True


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
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def start(self) -> None:
        """Begin, if anything is missing."""
        if is_missing():
            self._process = subprocess.Popen(  # noqa: S603 - this module
                [sys.executable, "-m", __name__],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self) -> None:
        """Return when it has ended; what it leaves out the workers compile for themselves.

        Raises StartFailed after `stop`.
        """
        if self._process is not None and self._process.wait() != 0:
            logger.info("kernels are not compiled ahead: exit code %d", self._process.returncode)
        if self._stopped:
            raise StartFailed("stopped while it compiled")

    def stop(self) -> None:
        """End it at once."""
        self._stopped = True
        if self._process is not None and self.is_running:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    sys.exit(0 if compile_all() else 1)
