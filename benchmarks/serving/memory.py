"""Memory and family of processes, from /proc. Standard library only.

RSS counts a page once for every process that maps it, so its sum over a cluster counts shared
libraries many times. PSS divides a page by the number of processes that map it: its sum is what the
system really occupies, mapped weights included.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROC = Path("/proc")
WATCH_INTERVAL_S = 0.5
KIB = 1024


def descendants(root: int) -> list[int]:
    """Pids of all processes below `root`, without itself; zombies are left out."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # "pid (name) state ppid ...": the name may hold spaces and brackets
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended meanwhile
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _field_bytes(path: Path, name: str) -> int:
    """A "Name:  123 kB" line of a file of /proc; 0 when the process has ended."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * KIB
    except OSError:
        pass
    return 0


class PeakMemory:
    """The most memory that a process and all its descendants had."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._lock = threading.Lock()
        self.peak_pss_bytes = 0
        self.peak_rss_bytes = 0

    def sample(self) -> None:
        """Look now. Walks page tables (10-20 ms for 4 GB): not while something is timed."""
        pids = [self._root, *descendants(self._root)]
        pss = sum(_field_bytes(PROC / str(pid) / "smaps_rollup", "Pss") for pid in pids)
        rss = sum(_field_bytes(PROC / str(pid) / "status", "VmHWM") for pid in pids)
        with self._lock:
            self.peak_pss_bytes = max(self.peak_pss_bytes, pss)
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample twice a second during the block: loading is where second copies appear."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(WATCH_INTERVAL_S):
                self.sample()

        thread = threading.Thread(target=watch, name="memory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def figures(self) -> dict[str, float]:
        """`peak_rss_bytes` adds up high-water marks: exact for one process, too high for many."""
        return {
            "peak_pss_bytes": float(self.peak_pss_bytes),
            "peak_rss_bytes": float(self.peak_rss_bytes),
        }
