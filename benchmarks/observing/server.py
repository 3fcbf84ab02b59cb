"""A server under test: `shoal serve`, whose processes enter an arm when they are told to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from serving.memory import descendants
from serving.processes import free_port
from serving.sse import wait_until_ok

READY_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 60.0
GRACE_S = 60.0
HOOK = Path(__file__).parent / "hook"
CONFIG = {
    "attention": {"engine": {"enable_prefix_caching": False}},  # all arms get the same prompts
    "observability": {"metrics": True, "traces": True, "log_format": "json"},
}


class Server:
    """One server; a context that ends it."""

    def __init__(self, on_ray: bool, collector: str, model: str | None = None) -> None:
        """collector: where spans go. model: a checkpoint folder, None: the one that ships."""
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-bench-")
        folder = Path(self._folder.name)
        config, self._switches = folder / "config.yaml", folder / "switches"
        config.write_text(json.dumps(CONFIG))
        self._switches.mkdir()
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inbox.bind(str(folder / "answers"))
        self._inbox.settimeout(ANSWER_TIMEOUT_S)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "cluster", "serve", *([model] if model else [])]
        command += ["--config", str(config), "--http-port", str(port)]
        command += ["--grpc-port", str(free_port())]
        command += ["--no-dashboard"] if on_ray else ["--inline"]
        path = [str(HOOK), str(HOOK.parents[1]), os.environ.get("PYTHONPATH", "")]
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                "SHOAL_BENCH_SWITCH": str(self._switches),
                "OMP_NUM_THREADS": "1",
                "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
                "OTEL_BSP_SCHEDULE_DELAY": "200",  # ms: spans go in the block that made them
            },
        )
        self._members: list[int] = []

    def __enter__(self) -> Self:
        try:
            wait_until_ok(self.url, "/readyz", READY_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def enter(self, arm: str) -> None:
        """Returns when every process runs it."""
        answers: dict[int, int] = {}
        for path in self._switches.iterdir():
            try:
                self._inbox.sendto(arm.encode(), str(path))
            except ConnectionRefusedError:  # it has ended
                path.unlink()
            else:
                answers[int(path.name)] = 0
        for _ in range(len(answers)):
            count, path_of_sender = self._inbox.recvfrom(64)
            answers[int(Path(path_of_sender).name)] = int(count)
        self._members = [pid for pid, count in answers.items() if count]

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds so far: of the processes that have Shoal loaded, and of all."""
        pids = (self._process.pid, *descendants(self._process.pid))
        return {
            "members": sum(map(_cpu_s, self._members)),
            "all": sum(map(_cpu_s, pids)),
        }

    def stop(self) -> None:
        """End it as Ctrl-C would."""
        family = (self._process.pid, *descendants(self._process.pid))
        self._process.terminate()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
        self._inbox.close()
        self._log.close()
        self._folder.cleanup()


def _cpu_s(pid: int) -> float:
    """By the process's own clock (clock_getcpuclockid), 0 if it is gone."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0
