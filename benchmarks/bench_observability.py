"""What observing costs: processor time and throughput with and without it, in the same processes.

`python benchmarks/bench_observability.py [--ray]` starts one `shoal serve` with everything on and
has its processes change between arms while nothing runs:

  without   as if nothing had been built: the product's functions less the lines that observe, times
            of requests and hops too (observing/arms.py)
  times     what cannot be turned off: times of requests and hops, in answers too
  observed  as it ships, with a JSON line a request: metrics of every member once a second to the
            directory and, on Ray, its agents
  traces    that, and spans of every request, sent to a collector that throws them away

A round is every arm twice, with the same prompts, in an order of chance and then backwards, so that
what else the machine does, and how it drifts, meets all arms alike. A block is about a second. Its
processor time is that of the server's processes alone: it tells what throughput costs where the
processor is the limit, and is disturbed far less by other work than the clock on the wall. Printed
are estimates over all rounds with 95 % intervals (observing/statistics.py).

Reading /metrics is too rare to be seen in a block: it is measured alone and told as a share of one
processor, for a reader that comes every five seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import machine
from observing.arms import ARMS
from observing.server import Server
from observing.statistics import added_percent, interval
from serving.drive import run
from serving.plan import Scenario
from serving.sse import SseTarget, get_json

RESULTS = Path(__file__).parent / "results" / "observability.json"
SETTLE_S = 0.3
"""Behind the last token, within the block, if spans may have to be made and sent."""
WARM_UP_BLOCKS = 10
NUM_READS = 20
READ_EVERY_S = 0.6
"""For the measurement: sooner, and the answer would be the last one."""
READER_PERIOD_S = 5.0

Block = dict[str, float]
"""Milliseconds a token by name: cpu of members, cpu of all processes, wall."""


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


class Load:
    """Blocks of the same requests for each arm of one server."""

    def __init__(self, server: Server, scenario: Scenario, settle_s: float) -> None:
        self._server, self._scenario, self._settle_s = server, scenario, settle_s
        self._target = SseTarget(server.url)

    def block(self, arm: str, seed: int) -> Block:
        """One run of the scenario in an arm."""
        self._server.enter(arm)
        before = self._server.cpu_s()
        records = run(self._target, self._scenario, seed)
        time.sleep(self._settle_s)
        after = self._server.cpu_s()
        times = [moment for record in records for moment in record.token_times_s]
        wall_s = max(times) - min(record.due_s for record in records)
        spent = {name: after[name] - before[name] for name in before} | {"wall": wall_s}
        return {name: 1e3 * seconds / len(times) for name, seconds in spent.items()}

    def round(self, arms: Sequence[str], seed: int) -> dict[str, Block]:
        """Each arm twice, the mean of both."""
        order = random.Random(seed).sample(list(arms), len(arms))  # noqa: S311
        blocks: dict[str, list[Block]] = {arm: [] for arm in arms}
        for arm in order + order[::-1]:
            blocks[arm].append(self.block(arm, seed))
        return {
            arm: {name: (one[name] + other[name]) / 2 for name in one}
            for arm, (one, other) in blocks.items()
        }


def read_percent(server: Server) -> dict[str, float]:
    """Of one processor, what a reader of /metrics takes; the idle server's own time taken off."""
    spent = {}
    for path in ("/livez", "/metrics"):
        before = server.cpu_s()
        for _ in range(NUM_READS):
            get_json(server.url, path)
            time.sleep(READ_EVERY_S)
        after = server.cpu_s()
        spent[path] = {name: (after[name] - before[name]) / NUM_READS for name in before}
    return {
        name: round(100 * (seconds - spent["/livez"][name]) / READER_PERIOD_S, 3)
        for name, seconds in spent["/metrics"].items()
    }


def measure(
    server: Server, scenario: Scenario, arms: Sequence[str], num_rounds: int, limit_s: float
) -> list[dict[str, Block]]:
    """So many rounds, fewer if they take longer than the limit."""
    load = Load(server, scenario, SETTLE_S if "traces" in arms else 0.0)
    end_s = time.monotonic() + limit_s
    for number in range(WARM_UP_BLOCKS):
        load.block(arms[number % len(arms)], seed=-1)
    rounds: list[dict[str, Block]] = []
    while len(rounds) < num_rounds and time.monotonic() < end_s:
        rounds.append(load.round(arms, len(rounds)))
        if len(rounds) % 20 == 0:
            print(f"{len(rounds)} rounds", summary(rounds), file=sys.stderr, flush=True)
    return rounds


def summary(rounds: Sequence[dict[str, Block]]) -> dict[str, Any]:
    """By arm: medians of milliseconds a token, and per cent that it has more than `without`."""
    told: dict[str, Any] = {}
    for arm, block in rounds[0].items():
        values = {name: [r[arm][name] for r in rounds] for name in block}
        told[arm] = {f"{name}_ms": round(statistics.median(v), 4) for name, v in values.items()}
        if arm != "without":
            told[arm]["added_percent"] = {
                name: interval(added_percent(v, [r["without"][name] for r in rounds]))
                for name, v in values.items()
            }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ray", action="store_true", help="on Ray, not all in one process")
    parser.add_argument("--model", help="a checkpoint folder; the one that ships")
    parser.add_argument("--name", help="of the results; inline or ray")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=30.0, help="at most")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=8, help="of a block")
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    scenario = Scenario("observed", 32, args.new_tokens, args.requests, args.concurrency)
    where = machine.describe()
    with collector() as endpoint, Server(args.ray, endpoint, args.model) as server:
        rounds = measure(server, scenario, args.arms, args.rounds, 60 * args.minutes)
        told = summary(rounds) | {"metrics_read_percent": read_percent(server)}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[args.name or ("ray" if args.ray else "inline")] = {
        "machine": where,
        "scenario": asdict(scenario),
        "rounds": len(rounds),
        "summary": told,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
