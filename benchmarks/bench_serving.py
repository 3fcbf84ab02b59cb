"""Serving benchmark: our systems, transformers and vLLM on one seeded checkpoint, in one run.

Every system runs in a fresh process; rounds run the systems in turn, every second one in reverse,
and ratios are taken within a round. See docs/benchmarks.md.

    python benchmarks/bench_serving.py --preset small
    python benchmarks/bench_serving.py --preset lite --systems inline transformers --repeat 1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import machine
import yaml
from serving import plan
from serving.model import model_size
from serving.processes import SystemFailed, adopt_orphans, exit_at_sigterm, run_system
from serving.report import markdown
from serving.results import HTTP_SUFFIX, TRANSFORMERS, Figures, Round

HERE = Path(__file__).parent
OURS = ("inline", "ray-inline-router", "ray-router")
SYSTEMS = (*OURS, "transformers", "transformers-float32", "transformers-bfloat16")
DEFAULT_TOKENS = {"small": 128, "lite": 32}
DEFAULT_RATES_PER_S = {"small": [2.0], "lite": [0.25]}
DEFAULT_OPEN_REQUESTS = {"small": 32, "lite": 8}
PREFILL_CONCURRENCY = (1, 4)
DEFAULT_SETTINGS: dict[str, Any] = {"experts": {"num_workers": 1}}
"""A second expert worker on a machine of few cores would only take them from the others."""


class Unit(NamedTuple):
    """One line of the report: a system at a level."""

    system: str
    level: str

    @property
    def label(self) -> str:
        return self.system + (HTTP_SUFFIX if self.level == "http" else "")


def main() -> int:
    """Exit code 1 when a system failed; the others' figures are written all the same."""
    options = parse_arguments()
    exit_at_sigterm()
    adopt_orphans()
    checkpoint = make_checkpoint(options.checkpoints, options.preset)
    run = describe_run(options, checkpoint)
    options.output.mkdir(parents=True, exist_ok=True)
    units = units_of(options)
    for number in range(options.repeat):
        measured = machine.read_bandwidth().items()
        best = run["machine"]["read_bytes_per_s"]
        best |= {threads: max(rate, best.get(threads, 0.0)) for threads, rate in measured}
        order = units if number % 2 == 0 else units[::-1]
        run["rounds"].append(run_round(options, order, units, checkpoint, run["failures"]))
        write_results(options, run)  # an interrupted run keeps its whole rounds
    print(markdown(run))
    return 1 if run["failures"] else 0


def parse_arguments() -> argparse.Namespace:
    """Options with the defaults that depend on the preset filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=sorted(DEFAULT_TOKENS), default="small")
    add("--systems", nargs="*", choices=SYSTEMS, default=[*OURS, "transformers"])
    add("--level", choices=("engine", "http", "both"), default="engine")
    add("--concurrency", nargs="*", type=int, default=[1, 8, 32], help="closed loops")
    add("--rate", nargs="*", type=float, help="open loops, requests/s")
    add("--open-requests", type=int, help="requests of an open loop")
    add("--tokens", type=int, help="new tokens a request")
    add("--repeat", type=int, default=3, help="rounds")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="Shoal's settings, see docs")
    add("--vllm-python", help="interpreter of an environment with vllm: measure it too")
    add("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "shoal-checkpoints")
    add("--output", type=Path, default=HERE / "results")
    add("--name", help="of the result files [serving-PRESET]")
    add("--seed", type=int, default=1, help="of prompts and arrivals")
    add("--timeout-s", type=float, default=3600.0, help="of one system in one round")
    options = parser.parse_args()
    preset = options.preset
    options.tokens = options.tokens or DEFAULT_TOKENS[preset]
    options.rate = DEFAULT_RATES_PER_S[preset] if options.rate is None else options.rate
    options.open_requests = options.open_requests or DEFAULT_OPEN_REQUESTS[preset]
    options.name = options.name or f"serving-{preset}"
    options.settings = settings_of(options.set)
    return options


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """`experts.num_workers=2` and the like over the benchmark's defaults, as one tree."""
    from cluster.config import merge

    settings = DEFAULT_SETTINGS
    for pair in pairs:
        path, _, value = pair.partition("=")
        tree: Any = yaml.safe_load(value)
        for key in reversed(path.split(".")):
            tree = {key: tree}
        settings = merge(settings, tree)
    return settings


def units_of(options: argparse.Namespace) -> list[Unit]:
    """What to measure. transformers has no server, so only the engine level."""
    names: list[str] = []
    for system in options.systems:
        both = [f"{TRANSFORMERS}float32", f"{TRANSFORMERS}bfloat16"]
        names += both if system == "transformers" else [system]
    if options.vllm_python:
        names.append("vllm")
    levels = ("engine", "http") if options.level == "both" else (options.level,)
    return [
        Unit(name, level)
        for level in levels
        for name in dict.fromkeys(names)
        if level == "engine" or not name.startswith(TRANSFORMERS)
    ]


def scenarios_of(options: argparse.Namespace) -> list[plan.Scenario]:
    """All scenarios of a run."""
    return [
        *(plan.prefill(concurrency) for concurrency in PREFILL_CONCURRENCY),
        *(plan.closed(concurrency, options.tokens) for concurrency in options.concurrency),
        *(plan.open_loop(rate, options.open_requests, options.tokens) for rate in options.rate),
    ]


def make_checkpoint(folder: Path, preset: str) -> Path:
    """The seeded checkpoint, made unless an earlier run did."""
    from cluster.tiny_checkpoint import DEFAULT_SEED, write_checkpoint

    checkpoint = folder / f"{preset}-{DEFAULT_SEED}"
    if not (checkpoint / "config.json").exists():
        say(f"making {checkpoint}")
        write_checkpoint(checkpoint, preset)
    return checkpoint


def read_files(checkpoint: Path) -> None:
    """Into the page cache: nobody's start shall depend on who ran before."""
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass


def describe_run(options: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """What the JSON holds besides the figures."""
    return {
        "preset": options.preset,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": machine.describe() | {"read_bytes_per_s": {}},
        "model": asdict(model_size(checkpoint)),
        "new_tokens": options.tokens,
        "open_requests": options.open_requests,
        "settings": options.settings,
        "seed": options.seed,
        "scenarios": [scenario.name for scenario in scenarios_of(options)],
        "rounds": [],
        "failures": [],
    }


def commit() -> str:
    """Short hash, with a + when files differ from it; "unknown" outside a repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def run_round(
    options: argparse.Namespace,
    order: list[Unit],
    columns: list[Unit],
    checkpoint: Path,
    failures: list[str],
) -> Round:
    """Every system once, in `order`; the result lists them as in `columns`."""
    found: Round = {}
    for unit in order:
        read_files(checkpoint)
        try:
            found[unit.label] = run_unit(options, unit, checkpoint)
        except SystemFailed as error:
            failures.append(f"{unit.label}: {str(error).splitlines()[-1]}")
            say(f"{unit.label} FAILED: {error}")
    return {unit.label: found[unit.label] for unit in columns if unit.label in found}


def run_unit(options: argparse.Namespace, unit: Unit, checkpoint: Path) -> Figures:
    """One system in its process. Raises SystemFailed."""
    scenarios = scenarios_of(options)
    if unit.system.startswith(TRANSFORMERS):  # it cannot admit a request while others run
        scenarios = [scenario for scenario in scenarios if scenario.rate_per_s is None]
    spec = {
        **unit._asdict(),
        "checkpoint": str(checkpoint),
        "scenarios": [asdict(scenario) for scenario in scenarios],
        "seed": options.seed,
        "settings": options.settings,
    }
    is_peer = unit.system == "vllm"
    script = HERE / ("peer_vllm.py" if is_peer else "measure_system.py")
    command = [options.vllm_python if is_peer else sys.executable, str(script)]
    figures: Figures = {}
    begin = time.monotonic()

    def on_message(message: dict[str, Any]) -> None:
        name, found = message["name"], message["figures"]
        figures.update({f"{name}.{figure}": value for figure, value in found.items()})
        shown = " ".join(f"{figure}={value:.4g}" for figure, value in found.items())
        say(f"{time.monotonic() - begin:6.1f} s  {unit.label:22} {name:12} {shown}")

    run_system(command, spec, options.timeout_s, on_message)
    return figures


def write_results(options: argparse.Namespace, run: dict[str, Any]) -> None:
    """JSON with every round's figures, and the report."""
    (options.output / f"{options.name}.json").write_text(json.dumps(run, indent=1) + "\n")
    (options.output / f"{options.name}.md").write_text(markdown(run))


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
