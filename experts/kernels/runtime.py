"""Which kernels this process uses, in how many threads, and where their machine code is kept.

Chosen once, at first use or in `warm_up`: the compiled kernels, or plain torch when Numba cannot be
imported or fails; `kernels().reason` says why and it is logged. Tests put another choice in place
with `override`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experts.kernels.code_folder import machine_code_folder

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
