"""The command line of `bench_serving.py`."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serving import plan
from serving.results import HTTP_SUFFIX, TRANSFORMERS, VLLM

OURS = ("inline", "ray-inline-router", "ray-router")
DTYPES = ("float32", "bfloat16")
TRANSFORMERS_RUNS = [f"{TRANSFORMERS}{dtype}" for dtype in DTYPES]
SYSTEMS = (*OURS, "transformers", *TRANSFORMERS_RUNS)
RESULTS = Path(__file__).parents[1] / "results"
PREFILL_CONCURRENCY = (1, 4)
DEFAULT_SETTINGS: dict[str, Any] = {"experts": {"num_workers": 1}}
"""A second expert worker on a machine of few cores would only take them from the others."""


@dataclass(frozen=True)
class Load:
    """Defaults that depend on how fast a checkpoint answers."""

    new_tokens: int
    rate_per_s: float
    open_requests: int


LOADS = {"small": Load(128, 2.0, 32), "lite": Load(32, 0.25, 8)}


@dataclass(frozen=True)
class Unit:
    """One line of the report: a system at a level."""

    system: str
    level: str

    @property
    def label(self) -> str:
        return self.system + (HTTP_SUFFIX if self.level == "http" else "")


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Options as given; what is None depends on the preset, see `scenarios_of`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", nargs="+", choices=sorted(LOADS), default=list(LOADS))
    add("--systems", nargs="*", choices=SYSTEMS, default=[*OURS, "transformers"])
    add("--level", choices=("engine", "http", "both"), default="engine")
    add("--concurrency", nargs="*", type=int, default=[1, 8, 32], help="closed loops [1 8 32]")
    add("--rate", nargs="*", type=float, help="open loops, requests/s [small 2, lite 0.25]")
    add("--open-requests", type=int, help="requests of an open loop [small 32, lite 8]")
    add("--tokens", type=int, help="new tokens a request [small 128, lite 32]")
    add("--repeat", type=int, default=3, help="rounds [3]")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of Shoal")
    add("--vllm-python", help="interpreter of an environment with vllm: measure it too")
    add("--vllm-dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    add("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "shoal-checkpoints")
    add("--output", type=Path, default=RESULTS, help="folder of the reports")
    add("--name", default="serving", help="reports are called NAME-PRESET")
    add("--seed", type=int, default=1, help="of prompts and arrivals")
    add("--timeout-s", type=float, default=3600.0, help="of one system in one round [3600]")
    options = parser.parse_args()
    if options.vllm_python and shutil.which(options.vllm_python) is None:
        parser.error(f"--vllm-python {options.vllm_python}: no such program")
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
        names += TRANSFORMERS_RUNS if system == "transformers" else [system]
    if options.vllm_python:
        names += [f"{VLLM}{dtype}" for dtype in options.vllm_dtypes]
    levels = ("engine", "http") if options.level == "both" else (options.level,)
    return [
        Unit(name, level)
        for level in levels
        for name in dict.fromkeys(names)
        if level == "engine" or not name.startswith(TRANSFORMERS)
    ]


def scenarios_of(options: argparse.Namespace, preset: str) -> list[plan.Scenario]:
    """All scenarios of a preset."""
    load = LOADS[preset]
    new_tokens = options.tokens or load.new_tokens
    rates = [load.rate_per_s] if options.rate is None else options.rate
    open_requests = options.open_requests or load.open_requests
    return [
        *(plan.prefill(concurrency) for concurrency in PREFILL_CONCURRENCY),
        *(plan.closed(concurrency, new_tokens) for concurrency in options.concurrency),
        *(plan.open_loop(rate, open_requests, new_tokens) for rate in rates),
    ]
