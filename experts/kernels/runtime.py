"""Which kernels this process uses, in how many threads, and where their machine code is kept.

Chosen once, at first use or in `warm_up`: the compiled kernels, or plain torch when Numba cannot be
imported or fails; `kernels().reason` says why and it is logged. Tests put another choice in place
with `override`.
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
from typing import Any

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The compiled entry points (see drivers.py), or none of them: then plain torch computes."""

    reason: str
    pool_address: int = 0
    linear: Any = None
    experts: Any = None

    @property
    def compiled(self) -> bool:
        return self.linear is not None


class _State:
    """What was chosen; `helpers` is a HelperThreads, there once the kernels are compiled."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.num_threads: int | None = None
        self.kernels: Kernels | None = None
        self.helpers: Any = None


_state = _State()


def kernels() -> Kernels:
    """The kernels of this process; loads or compiles them at the first call."""
    return _state.kernels or _choose()


def _choose() -> Kernels:
    with _state.lock:
        if _state.kernels is None:
            _state.kernels = _load()
            logger.info("kernels: %s", _state.kernels.reason)
        return _state.kernels


def _load() -> Kernels:
    if os.environ.get("SHOAL_KERNELS") == "torch":
        return Kernels("plain torch: SHOAL_KERNELS=torch")
    try:
        with machine_code_folder(Path(__file__).parent) as folder:
            from experts.kernels import drivers, jobs, threads
    except Exception as error:  # whatever breaks in the compiler, torch still computes
        logger.warning("kernels cannot be compiled", exc_info=True)
        return Kernels(f"plain torch: {type(error).__name__}: {error}")
    _state.helpers = threads.HelperThreads([jobs.pack_rows.address, jobs.multiply.address])
    _state.helpers.start(_state.num_threads or torch.get_num_threads())
    return Kernels(
        f"compiled, {_state.helpers.num_threads} threads, machine code in {folder}",
        _state.helpers.address,
        entry_point(None, drivers.linear_driver),
        entry_point(ctypes.c_int64, drivers.experts_driver),
    )


def entry_point(result: Any, compiled: Any) -> Any:
    """A Numba cfunc as a function of `bytes` that hold int64 values; it runs without the GIL."""
    return ctypes.CFUNCTYPE(result, ctypes.c_char_p)(compiled.address)


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


def configure_threads(num_threads: int) -> None:
    """Let torch and the kernels of this process use num_threads >= 1 threads. Call once, at start.

    Without a call both use what torch has found (OMP_NUM_THREADS, else the cores).
    Raises ValueError.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}, at least 1 is needed")
    torch.set_num_threads(num_threads)
    with _state.lock:
        _state.num_threads = num_threads
        if _state.helpers is not None:
            _state.helpers.start(num_threads)
    logger.info("torch and kernels use %d threads", num_threads)


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


def cache_folder() -> Path | None:
    """Where machine code outlives this process: NUMBA_CACHE_DIR, else the user's cache folder;
    None when that cannot be written."""
    try:
        folder = _chosen_cache()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _chosen_cache() -> Path:
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path("~").expanduser() / ".cache"
    return Path(home) / "shoal" / "kernels"


def _writable_cache() -> Path:
    """The user's cache folder, or a private one of this process when that cannot be written."""
    folder = cache_folder()
    if folder is not None:
        return folder
    private = Path(tempfile.mkdtemp(prefix="shoal-kernels-"))
    logger.warning("no cache can be written: kernels are compiled anew, in %s", private)
    return private


def _digest(folders: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
