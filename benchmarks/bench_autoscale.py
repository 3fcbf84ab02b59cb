"""A compressed day of traffic against a real application: static peak, whole replicas, Shoal.

    python benchmarks/bench_autoscale.py
    python benchmarks/bench_autoscale.py --quick
    python benchmarks/bench_autoscale.py --runs shoal

Each way to size the expert tier gets the same trace, one after the other, on a local Ray of its
own. Expert workers are paced to be as slow as an emulated device, so that a small machine hosts
many. With --runs the other ways' runs are kept from the last report, if the trace is the same. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tools"))

from autoscale import prompts, provisioning  # noqa: E402
from autoscale.figures import Answer, Bounds, summarise  # noqa: E402
from autoscale.plot import Curve, draw  # noqa: E402
from autoscale.provisioning import Fleet, Provisioning  # noqa: E402
from autoscale.replay import replay  # noqa: E402
from autoscale.report import markdown  # noqa: E402
from autoscale.trace import (  # noqa: E402
    AFTERNOON,
    MORNING,
    Day,
    Request,
    busiest_tokens_per_s,
    make_trace,
)
from autoscale.watch import Sample, Watch, count_replicas  # noqa: E402
from bench_serving import commit, say  # noqa: E402
from serving.processes import adopt_orphans, end_all, exit_at_sigterm  # noqa: E402
from serving.sse import SseTarget, wait_until_ok  # noqa: E402

from cluster.config import default_model, parse_config  # noqa: E402
from cluster.launcher import LocalCluster, free_port  # noqa: E402
from cluster.site import expert_space  # noqa: E402
from experts.config import ModelConfig  # noqa: E402

READY_TIMEOUT_S = 600.0
WARM_UP_S = 10.0
REST_S = 10.0
"""After the warm-up, so that the day begins with the pool that its first hour needs."""


def main() -> None:
    """Run, write after each run, draw."""
    options = _options()
    exit_at_sigterm()
    adopt_orphans()
    benchmark = Benchmark(options)
    for name in options.runs:
        benchmark.run(name)
    if "bounds" in benchmark.results:
        print(markdown(benchmark.results))


class Benchmark:
    """One trace; `results` is what the JSON file holds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        model = default_model()
        self._day = Day(options.peak_tokens, 60.0 * options.minutes)
        draws = prompts.draws(model, {**MORNING, **AFTERNOON})
        self._trace = make_trace(self._day, draws, options.seed)
        self._warm_up = make_trace(Day(options.peak_tokens / 4, WARM_UP_S), draws, options.seed + 1)
        self._fleet = fleet_for(model, self._trace, self._day, options)
        fixed = {
            "day_s": self._day.day_s,
            "peak_tokens_per_s": self._day.peak_tokens_per_s,
            "num_requests": len(self._trace),
            "seed": options.seed,
            "fleet": asdict(self._fleet),
        }
        self.results: dict[str, Any] = {
            **fixed,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(),
            "machine": machine.describe(),
            "runs": self._earlier_runs(fixed),
        }

    def run(self, name: str) -> None:
        """One way to size the tier; raises what a cluster raises that does not start."""
        way = provisioning.ALL[name](self._fleet)
        say(f"{way.title}: starting")
        answers, samples = measure(way, self._warm_up, self._trace)
        self.results["runs"][name] = {
            "title": way.title,
            "devices_per_worker": way.devices_per_worker,
            "settings": way.settings,
            "samples": columns(samples),
            "answers": columns(answers),
        }
        self._summarise()
        self._write()

    def _earlier_runs(self, fixed: dict[str, Any]) -> dict[str, Any]:
        """Those of the last report that this one does not repeat, in the order of the ways."""
        try:
            last = json.loads(self._json_path.read_text())
        except FileNotFoundError:
            return {}
        if any(last.get(key) != json.loads(json.dumps(value)) for key, value in fixed.items()):
            return {}
        return {k: run for k, run in last["runs"].items() if k not in self._options.runs}

    def _summarise(self) -> None:
        """The figures of all runs, by the bounds of the static one."""
        runs = self.results["runs"]
        if "static" not in runs:
            return
        bounds = Bounds.of(answers_of(runs["static"]))
        self.results["bounds"] = asdict(bounds)
        for run in runs.values():
            run["figures"] = summarise(
                answers_of(run),
                samples_of(run),
                run["devices_per_worker"],
                self._day.day_s,
                bounds,
            )

    @property
    def _json_path(self) -> Path:
        return Path(self._options.output) / f"{self._options.name}.json"

    def _write(self) -> None:
        self._json_path.parent.mkdir(parents=True, exist_ok=True)
        self._json_path.write_text(json.dumps(self.results) + "\n")
        if "bounds" not in self.results:
            return
        self._json_path.with_suffix(".md").write_text(markdown(self.results))
        curves = [
            Curve(name, run["title"], run["devices_per_worker"], answers_of(run), samples_of(run))
            for name, run in self.results["runs"].items()
        ]
        bounds = Bounds(**self.results["bounds"])
        draw(self._day, self._trace, curves, bounds, self._options.plot)


def fleet_for(
    model: Path, trace: Sequence[Request], day: Day, options: argparse.Namespace
) -> Fleet:
    """Devices just fast enough that so many carry the trace's peak as busy as they should be."""
    config = ModelConfig.load(model)
    space = expert_space(config)
    pairs_per_token = len(space.moe_layers) * config.num_experts_per_tok
    peak_pairs_per_s = busiest_tokens_per_s(trace, day) * pairs_per_token
    return Fleet(
        model=model.name,
        num_experts=space.num_total,
        unit_size=space.unit_size,
        num_devices=options.devices,
        pairs_per_s=peak_pairs_per_s / (options.devices * options.busy),
        target_busy=options.busy,
    )


def measure(
    way: Provisioning, warm_up: Sequence[Request], trace: Sequence[Request]
) -> tuple[list[Answer], list[Sample]]:
    """The trace against a cluster of its own."""
    with serving(way) as url:
        target = SseTarget(url)
        replay(target, warm_up, time.perf_counter())
        time.sleep(REST_S)
        say(f"{way.title}: the day begins")
        watch = Watch(url, count_replicas("Experts"))
        begin_s = time.perf_counter()
        watch.start(begin_s)
        records = replay(target, trace, begin_s)
        samples = watch.stop()
    return [Answer.of(record, begin_s) for record in records], samples


@contextmanager
def serving(way: Provisioning) -> Iterator[str]:
    """URL of the application; whatever it started has ended at the end."""
    listen = {"http_port": free_port(), "grpc_port": free_port()}
    local = LocalCluster(parse_config(way.settings | {"listen": listen}), dashboard=False)
    url = f"http://127.0.0.1:{listen['http_port']}"
    try:
        local.start()
        wait_until_ok(url, "/readyz", READY_TIMEOUT_S)
        yield url
        local.drain()
    finally:
        local.stop()
        end_all()


def columns(items: Sequence[Answer] | Sequence[Sample]) -> dict[str, list[float | None]]:
    """Field by field; what is infinite becomes null, JSON has no word for it."""
    rows = [asdict(item) for item in items]
    return {
        name: [round(row[name], 4) if math.isfinite(row[name]) else None for row in rows]
        for name in rows[0]
    }


def answers_of(run: dict[str, Any]) -> list[Answer]:
    """From its columns."""
    rows = zip(*run["answers"].values(), strict=True)
    return [Answer(*(math.inf if value is None else value for value in row)) for row in rows]


def samples_of(run: dict[str, Any]) -> list[Sample]:
    """From its columns."""
    return [Sample(*row) for row in zip(*run["samples"].values(), strict=True)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    ways = list(provisioning.ALL)
    add("--runs", nargs="+", choices=ways, default=ways)
    add("--minutes", type=float, default=10.0, help="that the day takes [10]")
    add("--peak-tokens", type=float, default=100.0, help="a second, at the peak [100]")
    add("--devices", type=int, default=12, help="that the peak needs [12]")
    add("--busy", type=float, default=0.35, help="how busy they are then [0.35]")
    add("--seed", type=int, default=1, help="of the trace")
    add("--quick", action="store_true", help="a day of 2 minutes; reports are called -quick")
    add("--output", type=Path, default=HERE / "results")
    add("--plot", type=Path, help="[docs/autoscaling.png; of --quick beside its report]")
    options = parser.parse_args()
    options.name = "autoscale"
    if options.quick:
        options.minutes, options.name = 2.0, "autoscale-quick"
        options.plot = options.plot or options.output / "autoscale-quick.png"
    options.plot = options.plot or HERE.parent / "docs" / "autoscaling.png"
    return options


if __name__ == "__main__":
    main()
