"""Where the machine code of kernels is kept. No torch: a start looks whether it is there."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


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
