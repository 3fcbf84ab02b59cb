"""Runs the units in a process of its own, in a new one after a kernel took the last one down.

A kernel that reads where it must not, or that does not end, takes its CUDA context with it. The
unit it was in fails; the next process goes on with the unit after it. A process that has to be
replaced for another reason says with which unit to go on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from serving.processes import SystemFailed, run_system

from gpu_check.rows import KINDS, Note, Results, to_message
from gpu_check.sections import ends_of

CHILD = Path(__file__).parent / "child.py"
ROOTS = (CHILD.parents[1], CHILD.parents[2])
"""Folders that are imported from: benchmarks/ and the repository."""


class ChildFailed(RuntimeError):
    """The process ended before its first unit; str() holds the end of its output."""


class Supervisor:
    """Fills `results` until all units ran, or until deadline_s of time.monotonic(). A section that
    is not a smoke run's has its share of the time."""

    def __init__(self, results: Results, sections: Sequence[str], deadline_s: float) -> None:
        self._results = results
        self._sections = list(sections)
        self._deadline_s = deadline_s
        if results["smoke"]:
            self._ends_s = [deadline_s] * len(self._sections)
        else:
            self._ends_s = ends_of(self._sections, time.monotonic(), deadline_s)
        self._num_units = 0
        self._begun: tuple[int, str] | None = None
        self._next: int | None = None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._task = self._progress.add_task("starting", total=None)

    def run(self) -> None:
        """Raises ChildFailed, KeyboardInterrupt; whatever it found until then is in `results`."""
        with self._progress:
            first = 0
            while (first := self._run_from(first)) < self._num_units:
                if time.monotonic() > self._deadline_s:
                    left = self._num_units - first
                    self._note("the rest", f"not run: out of time with {left} units left")
                    return
            self._progress.update(self._task, description="done", completed=self._num_units)
        self._results["finished"] = True

    def _run_from(self, first: int) -> int:
        """The unit to go on with."""
        self._begun = self._next = None
        spec = {
            "smoke": self._results["smoke"],
            "sections": self._sections,
            "ends_s": self._ends_s,
            "first": first,
        }
        left_s = max(1.0, self._deadline_s - time.monotonic())
        command = [sys.executable, str(CHILD)]
        try:
            run_system(command, spec, left_s, self._hear, _environment(spec["smoke"]))
        except SystemFailed as error:
            if self._begun is None:
                raise ChildFailed(str(error)) from None
            number, name = self._begun
            self._note(name, f"its process ended: {error}")
            return number + 1
        return self._num_units if self._next is None else self._next

    def _hear(self, message: dict[str, Any]) -> None:
        if "device" in message:
            self._results["device"] = message["device"]
        elif "num_units" in message:
            self._num_units = message["num_units"]
            self._progress.update(self._task, total=self._num_units)
        elif "next" in message:
            self._next = message["next"]
        elif "begin" in message:
            self._begun = message["begin"], message["name"]
            self._progress.update(
                self._task, description=message["name"], completed=message["begin"]
            )
        else:
            for kind in message.keys() & KINDS.keys():
                self._results[kind].append(message[kind])

    def _note(self, unit: str, text: str) -> None:
        self._hear(to_message(Note(unit, text, failed=True)))


def _environment(smoke: bool) -> dict[str, str]:
    paths = [*map(str, ROOTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(paths)}
    return found | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if smoke else {})
