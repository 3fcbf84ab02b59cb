"""Run all tests in the time that two cores allow.

Unit tests keep one core busy; tests with a Ray cluster mostly wait for processes to start. So both
run at the same time, the unit tests with their output in a file that is shown when they end. What
times real failures has the machine to itself, afterwards. Arguments (a path, -k, ...) go to a
single pytest as they are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

UNIT, RAY, ALONE = "not ray and not alone", "ray and not alone", "alone"
NO_TESTS = 5  # pytest's exit status when nothing was selected
UNIT_NICENESS = 5


def start(
    markers: str, arguments: Sequence[str], niceness: int = 0, output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-m", markers, *arguments]
    return subprocess.Popen(command, stdout=output, preexec_fn=lambda: os.nice(niceness))


def run_all() -> int:
    """The worst exit status. Ctrl-C ends what runs, as pytest does, and is passed on."""
    running: list[subprocess.Popen[bytes]] = []
    begun_s = time.monotonic()
    with tempfile.TemporaryFile() as unit_output:
        try:
            running.append(start(UNIT, ["-p", "no:cacheprovider"], UNIT_NICENESS, unit_output))
            print("unit tests run in the background, tests on Ray here", flush=True)
            running.append(start(RAY, []))
            statuses = [running[1].wait(), running[0].wait()]
            unit_output.seek(0)
            sys.stdout.flush()
            sys.stdout.buffer.write(unit_output.read())
            sys.stdout.flush()
            running.append(start(ALONE, []))
            statuses.append(running[2].wait())
        except KeyboardInterrupt:
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                process.wait()
            return 130
    took_s = time.monotonic() - begun_s
    worst = max(0 if status == NO_TESTS else abs(status) for status in statuses)
    print(f"all tests: {'passed' if not worst else 'FAILED'} in {took_s / 60:.1f} minutes")
    return worst


def main() -> int:
    os.chdir(Path(__file__).parents[1])
    if len(sys.argv) > 1:
        return subprocess.call([sys.executable, "-m", "pytest", *sys.argv[1:]])
    return run_all()


if __name__ == "__main__":
    sys.exit(main())
