"""`shoal serve` as a process of its own, and everything it started, to look at and to harm.

It has its own Ray: what these tests do to a cluster must not reach the tests that share one.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.launcher import free_port
from router.config import RouterConfig
from tests.cluster.conftest import Server, wait_ready

MARK = "SHOAL_CHAOS_RUN"
"""Environment variable that every process of a deployment inherits."""
REPLICA_TITLE = "ray::ServeReplica:shoal:"
NUM_EXPERTS = 3 * 16  # of the preset v3
NUM_LANES = RouterConfig().lanes
CONNECTED = "03"  # state of a socket in /proc/net/unix
START_TIMEOUT_S = 600.0
WHOLE_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 240.0
ENDED_TIMEOUT_S = 60.0
POLL_S = 0.1

Worker = dict[str, Any]


@dataclass
class Deployment:
    """A running `shoal serve`."""

    server: Server
    folder: Path
    mark: str
    wanted: dict[str, int]
    """Workers of each role at full strength."""
    num_held: int
    """Slots that are filled at full strength, if there are so many."""

    # ---- what the cluster says

    def workers(self, role: str) -> list[Worker]:
        """Live members of a role, as the ingress knows them."""
        return [w for w in self.server.get("/status")["workers"] if w["role"] == role]

    def engines(self) -> list[dict[str, Any]]:
        """Statistics of the attention workers."""
        found: list[dict[str, Any]] = self.server.get("/status")["engines"]
        return found

    def missing(self) -> str:
        """What a cluster at full strength has and this one lacks, in words; "" when whole."""
        status = self.server.get("/status")
        if not status["ready"] or not status["stage"].startswith("ready"):
            return str(status["stage"])
        roles = dict(Counter(worker["role"] for worker in status["workers"]))
        if roles != self.wanted or len(status["engines"]) != roles["attention"]:
            return f"{roles}, {len(status['engines'])} engines"
        held, slots = (sum(w[k] for w in status["workers"]) for k in ("num_experts", "num_slots"))
        return f"{held} experts in {slots} slots" if held < min(slots, self.num_held) else ""

    def wait_whole(self, timeout_s: float = WHOLE_TIMEOUT_S) -> None:
        """Until every worker is there with all its experts."""
        until(self.missing, timeout_s, "not at full strength")

    def scale_experts(self, workers: int) -> None:
        """Ask for so many expert workers."""
        self.server.post("/v1/scale", {"tier": "experts", "workers": workers})
        self.wanted["experts"] = workers

    def wait_idle(self, timeout_s: float = 20.0) -> None:
        """Every KV block of every attention worker is free."""

        def held() -> str:
            used = [e["kv_blocks_total"] - e["kv_blocks_free"] for e in self.engines()]
            return f"blocks in use: {used}" if any(used) else ""

        until(held, timeout_s, "KV blocks leak")

    # ---- what the machine says

    def processes(self) -> list[psutil.Process]:
        """Everything that this deployment started and that runs."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return process.environ().get(MARK) == self.mark
        return False

    def titled(self, title: str) -> list[psutil.Process]:
        """Processes whose title starts so: Ray names its actors."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if title_of(process).startswith(title):
                    found.append(process)
        return found

    def replicas(self) -> Counter[str]:
        """Processes of each Serve deployment."""
        titles = (title_of(process) for process in self.titled(REPLICA_TITLE))
        return Counter(title.removeprefix(REPLICA_TITLE).split(":")[0] for title in titles)

    def connections(self) -> int:
        """Accepted connections of the data plane and the directory, all workers together."""
        count = 0
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            fields = line.split()
            if len(fields) == 8 and fields[5] == CONNECTED:
                count += fields[7].startswith(str(self.folder))
        return count

    @property
    def most_connections(self) -> int:
        """When everybody is connected to all that they may need."""
        ingress, attention, router, experts = (
            self.wanted[role] for role in ("ingress", "attention", "router", "experts")
        )
        to_directory = ingress + attention + router + experts
        hops = ingress * attention + attention * router + router * NUM_LANES * experts
        return to_directory + hops


def until(fault: Callable[[], str], timeout_s: float, what: str) -> float:
    """Seconds until `fault` returns ""; fails the test after `timeout_s`."""
    started, last = time.monotonic(), ""
    while (waited := time.monotonic() - started) < timeout_s:
        try:
            last = fault()
        except (OSError, psutil.Error) as error:
            last = repr(error)
        if not last:
            return waited
        time.sleep(POLL_S)
    pytest.fail(f"{what} after {timeout_s:.0f} s: {last}")


def title_of(process: psutil.Process) -> str:
    """Its command line, or what it calls itself, padded to the command line's length."""
    return " ".join(process.cmdline()).strip()


def send(pid: int, sign: signal.Signals) -> float:
    """Send a signal; the moment just before."""
    now = time.monotonic()
    os.kill(pid, sign)
    return now


@contextmanager
def deployed(
    model: Path, settings: dict[str, Any], folder: Path, stop: signal.Signals = signal.SIGTERM
) -> Iterator[Deployment]:
    """`shoal serve` of these settings, at full strength, until `stop`.

    As a user runs it, so: the curl that it prints works, a stream that is open at `stop` comes to
    its end, the exit code is 0 and nothing is left afterwards. `folder`: for sockets, so its path
    must be short.
    """
    listen = {"http_port": free_port(), "grpc_port": free_port()}
    config = {**settings, "listen": listen, "runtime_dir": str(folder)}
    (folder / "settings.yaml").write_text(yaml.safe_dump(config))
    mark = secrets.token_hex(8)
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "serve", str(model)]
            + ["--config", str(folder / "settings.yaml"), "--no-dashboard"],
            stdout=output,
            stderr=output,
            env={**os.environ, MARK: mark},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{listen['http_port']}"
    server = Server(url, f"127.0.0.1:{listen['grpc_port']}", model.name)
    tiers = {role: settings[role]["num_workers"] for role in ("experts", "router", "attention")}
    held = NUM_EXPERTS + settings["experts"]["redundancy"]
    found = Deployment(server, folder, mark, {**tiers, "ingress": 1}, held)
    try:
        wait_ready(url, START_TIMEOUT_S)
        found.wait_whole()
        until(lambda: zombies(process.pid), ENDED_TIMEOUT_S, "zombies")
        run_printed_curl(log)
        yield found
        with closing(ask_for_stream(url)) as connection:
            stream = connection.getresponse()
            stream.readline()
            process.send_signal(stop)
            assert stream.read().strip().endswith(b"data: [DONE]")
        assert process.wait(STOP_TIMEOUT_S) == 0, log.read_text()[-2000:]
        until(lambda: str(found.processes() or ""), ENDED_TIMEOUT_S, "processes left behind")
    finally:
        for left in found.processes():
            with suppress(psutil.Error):
                left.kill()
        process.wait()


def zombies(pid: int) -> str:
    """Descendants of a process that ended and that nobody waits for; "" if there are none."""
    children = psutil.Process(pid).children(recursive=True)
    return " ".join(str(c) for c in children if c.status() == psutil.STATUS_ZOMBIE)


def run_printed_curl(log: Path) -> None:
    def printed() -> list[str]:
        return [line for line in log.read_text().splitlines() if line.startswith("curl ")]

    until(lambda: "" if printed() else log.read_text(), START_TIMEOUT_S, "no curl is printed")
    done = subprocess.run(
        ["sh", "-c", printed()[0]], capture_output=True, text=True, timeout=START_TIMEOUT_S
    )
    assert '"finish_reason"' in done.stdout, done.stderr


def ask_for_stream(url: str) -> http.client.HTTPConnection:
    """A connection on which a streamed chat of a second begins."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    body |= {"max_tokens": 60, "ignore_eos": True}
    address = url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=START_TIMEOUT_S)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return connection
