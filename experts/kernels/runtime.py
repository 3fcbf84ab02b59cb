"""Which kernels this process uses, in how many threads, and where their machine code is kept.

Chosen once, at first use or in `warm_up`: the compiled kernels, or plain torch when Numba cannot be
imported or fails; `kernels().reason` says why and it is logged. Tests put another choice in place
with `override`.

Threads: kernels run as parallel regions of the OpenMP runtime that torch has loaded, by its entry
point GOMP_parallel. So torch's operators and our kernels share one pool. (Numba's own layers: its
OpenMP layer brings a second runtime whose threads spin against torch's, its workqueue layer aborts
when two Python threads enter it at once, TBB is one more package. See docs/decisions/0002.)
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

logger = logging.getLogger(__name__)

_OPENMP_NAMES: Final = ("libgomp.so.1", "libiomp5.so", "libomp.so.5", "libomp.so", "libomp.dylib")


@dataclass(frozen=True)
class Threads:
    """Threads of a parallel region, the runtime's entry point (0: none, one thread), and why."""

    num_threads: int
    gomp_parallel: int
    reason: str


@dataclass(frozen=True)
class Kernels:
    """The compiled entry points (see drivers.py), or none of them: then plain torch computes."""

    reason: str
    runtime_address: int = 0
    linear: Any = None
    experts: Any = None

    @property
    def compiled(self) -> bool:
        return self.linear is not None


class _State:
    """What was chosen. `runtime` is what compiled code reads: entry point, threads, two bodies."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.runtime = np.zeros(4, np.int64)
        self.threads: Threads | None = None
        self.kernels: Kernels | None = None


_state = _State()


def kernels() -> Kernels:
    """The kernels of this process; loads or compiles them at the first call."""
    return _state.kernels or _choose()


def _choose() -> Kernels:
    with _state.lock:
        if _state.kernels is None:
            if _state.threads is None:
                _use_threads(torch.get_num_threads(), "as many as torch uses")
            _state.kernels = _load()
            logger.info("kernels: %s", _state.kernels.reason)
        return _state.kernels


def _load() -> Kernels:
    if os.environ.get("SHOAL_KERNELS") == "torch":
        return Kernels("plain torch: SHOAL_KERNELS=torch")
    try:
        with machine_code_folder(Path(__file__).parent) as folder:
            from experts.kernels import drivers, jobs
    except Exception as error:  # whatever breaks in the compiler, torch still computes
        logger.warning("kernels cannot be compiled", exc_info=True)
        return Kernels(f"plain torch: {type(error).__name__}: {error}")
    _state.runtime[2:] = jobs.pack_rows.address, jobs.multiply.address
    return Kernels(
        f"compiled, machine code in {folder}",
        _state.runtime.ctypes.data,
        function(None, 10, drivers.linear_driver),
        function(ctypes.c_int64, 15, drivers.experts_driver),
    )


def function(result: Any, num_arguments: int, compiled: Any) -> Any:
    """A Numba cfunc of int64 arguments as a ctypes function: releases the GIL, costs about 1 us."""
    return ctypes.CFUNCTYPE(result, *[ctypes.c_int64] * num_arguments)(compiled.address)


def warm_up() -> str:
    """Load or compile everything now instead of in the first request; returns what is used."""
    return kernels().reason


@contextmanager
def override(choice: Kernels) -> Iterator[None]:
    """Use `choice` while the context lasts (tests)."""
    before = kernels()
    _state.kernels = choice
    try:
        yield
    finally:
        _state.kernels = before


def configure_threads(num_threads: int) -> Threads:
    """Let torch and the kernels of this process use num_threads >= 1 threads. Call once, at start.

    A process that has the machine for itself takes its cores; processes that share a machine share
    them out (two OpenMP pools on the same cores wait for each other in every operator).
    """
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}, at least 1 is needed")
    torch.set_num_threads(num_threads)
    return _use_threads(num_threads, "as configured")


def _use_threads(wanted: int, why: str) -> Threads:
    with _state.lock:
        entry = _gomp_parallel()
        threads = (
            Threads(wanted, entry, why) if entry else Threads(1, 0, "torch has loaded no OpenMP")
        )
        _state.threads = threads
        _state.runtime[:2] = threads.gomp_parallel, threads.num_threads
        logger.info("kernel threads: %d, %s", threads.num_threads, threads.reason)
        return threads


def _gomp_parallel() -> int:
    """Address of GOMP_parallel in a runtime that is loaded already (LLVM's has it too), or 0."""
    for name in _OPENMP_NAMES:
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


@contextmanager
def machine_code_folder(*sources: Path) -> Iterator[Path]:
    """Kernels imported in this context keep their machine code in the folder it yields.

    Numba notices a change of the file that defines a function, not of the files it uses: the
    folder's name has a digest of all `sources` (folders of kernels). Numba itself tells CPUs and
    versions apart. NUMBA_CACHE_DIR, when set, is left in charge.
    """
    import numba

    before = numba.config.CACHE_DIR
    folder = Path(before) if before else _writable_cache() / _digest(sources)
    numba.config.CACHE_DIR = str(folder)
    try:
        yield folder
    finally:
        numba.config.CACHE_DIR = before


def _writable_cache() -> Path:
    """The user's cache folder, or a private one of this process when that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~").expanduser() / ".cache")
    folder = Path(home) / "shoal" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    private = Path(tempfile.mkdtemp(prefix="shoal-kernels-"))
    logger.warning("%s cannot be written: kernels are compiled anew, in %s", folder, private)
    return private


def _digest(folders: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
