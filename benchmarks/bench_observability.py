"""What observing costs: throughput and processor time with and without metrics, logs and traces.

`python benchmarks/bench_observability.py [--ray]` starts one `shoal serve` an arm on the model that
ships and puts the same load on one after the other, in another order each round; meanwhile every
process of the other servers is stopped (SIGSTOP), so that nobody pays for their background work.

  off      `observability.metrics: false`, only warnings are logged
  on       metrics of every member, to the directory, /metrics (read every five seconds) and, on
           Ray, its agents; a JSON line a request
  traces   that, and spans of every request, sent to a collector that throws them away

Blocks are short, about a second: what else the machine does changes slowly, so all arms of a round
meet the same. Of each round the ratio of an arm to `off` is taken; printed are the medians of these
and their 95 % intervals (by ranks). Processor time is that of all processes of a server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import machine
from balance.cost import median_interval
from serving.memory import descendants
from serving.over_http import HttpSystem
from serving.plan import Scenario
from serving.processes import free_port
from serving.sse import get_json, wait_until_ok

RESULTS = Path(__file__).parent / "results"
READY_TIMEOUT_S = 180.0
SETTLE_S = 0.3
SCRAPE_PERIOD_S = 5.0
GRACE_S = 60.0
METRICS_OFF = {"observability": {"metrics": False}}
ARMS: dict[str, list[str]] = {
    "off": [],
    "on": ["--log-format", "json"],
    "traces": ["--log-format", "json", "--traces"],
}


@dataclass
class Round:
    """Figures of one block of each arm."""

    tokens_per_s: dict[str, float] = field(default_factory=dict)
    cpu_ms_per_token: dict[str, float] = field(default_factory=dict)


class ArmServer:
    """`shoal serve` with all its processes, which stand still between blocks."""

    def __init__(self, arm: str, on_ray: bool, folder: Path, collector: str) -> None:
        self._scrapes = arm != "off"
        port, grpc_port = free_port(), free_port()
        flags = ["--http-port", str(port), "--grpc-port", str(grpc_port), *ARMS[arm]]
        flags += ["--no-dashboard"] if on_ray else ["--inline"]
        if arm == "off":
            config = folder / "off.yaml"
            config.write_text(json.dumps(METRICS_OFF))
            flags += ["--config", str(config)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "serve", *flags],
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{arm}.log").open("w"),
            env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": collector},
        )
        self._url = f"http://127.0.0.1:{port}"

    def wait_ready(self) -> None:
        wait_until_ok(self._url, "/readyz", READY_TIMEOUT_S)

    def signal(self, sign: signal.Signals) -> None:
        """To every process, parents first."""
        for pid in (self._process.pid, *descendants(self._process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Runs for the block."""
        self.signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        yield
        self.signal(signal.SIGSTOP)

    def block(self, scenario: Scenario, seed: int) -> tuple[float, float]:
        """(tokens/s, processor ms a token) of one run of the scenario."""
        done = threading.Event()
        scraper = threading.Thread(target=self._scrape, args=(done,))
        before_s = self._cpu_s()
        scraper.start()
        records = HttpSystem(self._url, lambda: None).run(scenario, seed)
        done.set()
        scraper.join()
        times = [moment for record in records for moment in record.token_times_s]
        took_s = max(times) - min(record.due_s for record in records)
        return len(times) / took_s, 1e3 * (self._cpu_s() - before_s) / len(times)

    def _scrape(self, done: threading.Event) -> None:
        while self._scrapes and not done.is_set():
            get_json(self._url, "/metrics")
            done.wait(SCRAPE_PERIOD_S)

    def _cpu_s(self) -> float:
        pids = (self._process.pid, *descendants(self._process.pid))
        return sum(map(_cpu_of, pids))

    def stop(self) -> None:
        """End it as Ctrl-C would."""
        self.signal(signal.SIGCONT)
        time.sleep(SETTLE_S)  # a thread that still stands would miss the next signal
        self._process.terminate()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self._process.wait()


def _cpu_of(pid: int) -> float:
    """Seconds that a process ran, 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Nowhere(BaseHTTPRequestHandler):
    """A collector of OpenTelemetry that takes everything and keeps nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def collector() -> Iterator[str]:
    """The address of a collector."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Nowhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def measure(arms: Sequence[str], on_ray: bool, scenario: Scenario, rounds: int) -> list[Round]:
    """Blocks of all arms, in a random order each round."""
    found = []
    with tempfile.TemporaryDirectory() as folder, collector() as endpoint:
        servers: dict[str, ArmServer] = {}
        try:
            for arm in arms:
                servers[arm] = ArmServer(arm, on_ray, Path(folder), endpoint)
                servers[arm].wait_ready()
                servers[arm].block(scenario, seed=-1)  # warm
                servers[arm].signal(signal.SIGSTOP)
            for number in range(rounds):
                found.append(Round())
                for arm in random.Random(number).sample(list(arms), len(arms)):  # noqa: S311
                    with servers[arm].awake():
                        figures = servers[arm].block(scenario, seed=number)
                    found[-1].tokens_per_s[arm], found[-1].cpu_ms_per_token[arm] = figures
                print(f"round {number + 1}: {found[-1].tokens_per_s}", file=sys.stderr)
        finally:
            for server in servers.values():
                server.stop()
    return found


def summary(rounds: Sequence[Round], arms: Sequence[str]) -> dict[str, Any]:
    """By arm: medians, and how many per cent it loses of the throughput of `off` in its rounds."""
    told: dict[str, Any] = {}
    for arm in arms:
        told[arm] = {
            "tokens_per_s": round(statistics.median(r.tokens_per_s[arm] for r in rounds), 1),
            "cpu_ms_per_token": round(
                statistics.median(r.cpu_ms_per_token[arm] for r in rounds), 4
            ),
        }
        if arm != "off":
            slower = [100 * (1 - r.tokens_per_s[arm] / r.tokens_per_s["off"]) for r in rounds]
            dearer = [
                100 * (r.cpu_ms_per_token[arm] / r.cpu_ms_per_token["off"] - 1) for r in rounds
            ]
            told[arm]["throughput_lost_percent"] = _median(slower)
            told[arm]["cpu_added_percent"] = _median(dearer)
    return told


def _median(values: Sequence[float]) -> dict[str, float]:
    low, high = median_interval(values)
    named = {"median": statistics.median(values), "low": low, "high": high}
    return {name: round(value, 2) for name, value in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ray", action="store_true", help="on Ray, not all in one process")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="of a block")
    args = parser.parse_args()
    scenario = Scenario("observed", 32, args.new_tokens, args.requests, args.concurrency)
    where = machine.describe()
    rounds = measure(args.arms, args.ray, scenario, args.rounds)
    path = RESULTS / "observability.json"
    name = "ray" if args.ray else "inline"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = {
        "machine": where,
        "scenario": vars(args),
        "summary": summary(rounds, args.arms),
        "rounds": [vars(r) for r in rounds],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results[name]["summary"], indent=1))


if __name__ == "__main__":
    main()
