"""One system in a process of its own: start it, warm it up, measure it, report.

Standard library only: `system_process.py` and the peers call `run_session` with what they measure.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from serving.memory import PeakMemory
from serving.plan import FIRST_ANSWER, Scenario
from serving.processes import SIGTERM_EXIT, exit_at_sigterm
from serving.summary import RequestRecord, summarise

PR_SET_PDEATHSIG = 1


class System(Protocol):
    """Something that answers requests."""

    def run(self, scenario: Scenario, seed: int) -> list[RequestRecord]:
        """Do a whole scenario."""

    def close(self) -> None:
        """End it and all its processes."""


@dataclass(frozen=True)
class Spec:
    """What the parent process asks for."""

    system: str
    level: str
    """engine: token ids to the attention workers; http: server-sent events."""
    checkpoint: Path
    scenarios: list[Scenario]
    seed: int
    spawned_s: float
    """When the process was started, by the machine's monotonic clock."""
    parent_pid: int
    settings: dict[str, Any]
    """A part of Shoal's configuration; peers have none."""

    @classmethod
    def read(cls, path: str) -> Spec:
        """From the JSON file that `processes.run_system` wrote."""
        data = json.loads(Path(path).read_text())
        data["checkpoint"] = Path(data["checkpoint"])
        data["scenarios"] = [Scenario(**scenario) for scenario in data["scenarios"]]
        return cls(**data)


def run_session(open_system: Callable[[Spec], System]) -> None:
    """The main function of a measured process: `--spec FILE --report FD`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--report", required=True, type=int, help="file descriptor to write to")
    arguments = parser.parse_args()
    os.set_inheritable(arguments.report, False)  # its end must mean the end of this process
    spec = Spec.read(arguments.spec)
    _end_with_parent(spec.parent_pid)
    with os.fdopen(arguments.report, "w", buffering=1) as report:

        def emit(name: str, figures: dict[str, float]) -> None:
            report.write(json.dumps({"name": name, "figures": figures}) + "\n")

        _measure(spec, open_system, emit)


def _end_with_parent(parent_pid: int) -> None:
    """Be told when the parent dies, and close the system then as after any other SIGTERM."""
    exit_at_sigterm()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(SIGTERM_EXIT)  # it died before it could be watched


def _measure(
    spec: Spec,
    open_system: Callable[[Spec], System],
    emit: Callable[[str, dict[str, float]], None],
) -> None:
    memory = PeakMemory(os.getpid())
    with memory.watching():
        system = open_system(spec)
    try:
        ready_s = time.perf_counter() - spec.spawned_s
        first = system.run(FIRST_ANSWER, spec.seed)[0].token_times_s[0] - spec.spawned_s
        emit("start", {"ready_s": ready_s, "first_answer_s": first})
        memory.sample()
        for scenario in spec.scenarios:
            system.run(scenario.warm_up(), spec.seed)
        for scenario in spec.scenarios:
            records = system.run(scenario, spec.seed)
            emit(scenario.name, summarise(records, scenario.prompt_tokens, scenario.new_tokens))
            memory.sample()
        emit("memory", memory.figures())
    finally:
        system.close()
