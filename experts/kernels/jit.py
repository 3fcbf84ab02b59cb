"""Compiling a small function with Numba, or leaving it plain Python.

For loops over a few hundred numbers: plain they take milliseconds in place of microseconds, with
the same result. The heavy kernels of this package are built in `runtime`.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from experts.kernels.code_folder import machine_code_folder

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """The function as machine code, made at its first call and kept on disk; it runs without the
    GIL. The function itself with SHOAL_KERNELS=torch or where Numba cannot be imported."""
    if os.environ.get("SHOAL_KERNELS") == "torch":
        return function
    try:
        with machine_code_folder(Path(function.__code__.co_filename).parent):
            from numba import njit

            fast: Function = njit(nogil=True, cache=True)(function)
    except Exception:
        logger.warning("%s stays plain Python", function.__name__, exc_info=True)
        return function
    return fast
