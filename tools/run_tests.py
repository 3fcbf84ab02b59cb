"""Run all tests in the time that two cores allow.

Unit tests keep a core busy; tests with a Ray cluster mostly wait for processes to start. So both
run at the same time, the unit tests in two halves that give way to the others, with their output
in files that are shown when they end. What times real failures has the machine to itself,
afterwards. Arguments (a path, -k, ...) go to a single pytest as they are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

UNIT, RAY, ALONE = "not ray and not alone", "ray and not alone", "alone"
NO_TESTS = 5  # pytest's exit status when nothing was selected
UNIT_NICENESS = 10
TESTS = Path("tests")
SECOND_HALF = ("benchmarks", "browser", "gpu", "k8s")
"""Folders of tests whose unit tests take as long as all others."""


def unit_halves() -> list[list[str]]:
    """Paths for pytest: together, each test once."""
    second = [str(TESTS / name) for name in SECOND_HALF]
    found = {str(path) for path in (*TESTS.glob("*/"), *TESTS.glob("test_*.py"))}
    return [
        sorted(path for path in found if Path(path).name[:1] not in "_." and path not in second),
        second,
    ]


def files_with(marker: str) -> list[str]:
    """Files with tests of a marker, by their text: importing all others takes half a minute."""
    found = TESTS.glob("*/test_*.py")
    return sorted(str(path) for path in found if f"pytest.mark.{marker}" in path.read_text())


def start(
    markers: str, arguments: Sequence[str], niceness: int = 0, output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-m", markers, *arguments]
    return subprocess.Popen(command, stdout=output, preexec_fn=lambda: os.nice(niceness))


def run_all() -> int:
    """The worst exit status. Ctrl-C ends what runs, as pytest does, and is passed on."""
    running: list[subprocess.Popen[bytes]] = []
    begun_s = time.monotonic()
    with ExitStack() as stack:
        try:
            outputs = []
            for paths in unit_halves():
                outputs.append(stack.enter_context(tempfile.TemporaryFile()))
                arguments = ["-p", "no:cacheprovider", *paths]
                running.append(start(UNIT, arguments, UNIT_NICENESS, outputs[-1]))
            print("unit tests run in the background, tests on Ray here", flush=True)
            running.append(start(RAY, files_with("ray")))
            statuses = [process.wait() for process in reversed(running)]
            for output in outputs:
                show(output)
            running.append(start(ALONE, files_with("alone")))
            statuses.append(running[-1].wait())
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


def show(output: IO[bytes]) -> None:
    output.seek(0)
    sys.stdout.flush()
    sys.stdout.buffer.write(output.read())
    sys.stdout.flush()


def main() -> int:
    os.chdir(Path(__file__).parents[1])
    if len(sys.argv) > 1:
        return subprocess.call([sys.executable, "-m", "pytest", *sys.argv[1:]])
    return run_all()


if __name__ == "__main__":
    sys.exit(main())
