"""Compiled kernels of this package, if the process uses compiled kernels at all."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from types import ModuleType

import attention.kernels
import experts.kernels
from experts.kernels.code_folder import machine_code_folder
from experts.kernels.runtime import kernels

logger = logging.getLogger(__name__)


@cache
def _load() -> ModuleType | None:
    folders = [Path(package.__path__[0]) for package in (attention.kernels, experts.kernels)]
    try:
        with machine_code_folder(*folders):
            from attention.kernels import entry
    except Exception:  # whatever breaks in the compiler, torch still computes
        logger.warning("attention kernels cannot be compiled: plain torch", exc_info=True)
        return None
    return entry


def entry_points() -> ModuleType | None:
    """attention.kernels.entry, or None: then the plain-torch twins compute.

    Compiles or loads at the first call; follows the choice of `experts.kernels.runtime`.
    """
    return _load() if kernels().compiled else None
