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
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
from serving.model import model_size
from serving.options import Unit, parse_arguments, scenarios_of, settings_of, units_of
from serving.plan import Scenario
from serving.processes import SystemFailed, adopt_orphans, exit_at_sigterm, run_system
from serving.report import markdown
from serving.results import TRANSFORMERS, VLLM, Figures, Round

HERE = Path(__file__).parent


def main() -> int:
    """Exit code 1 when a system failed; the others' figures are written all the same."""
    options = parse_arguments(__doc__)
    exit_at_sigterm()
    adopt_orphans()
    options.output.mkdir(parents=True, exist_ok=True)
    failed = False
    for preset in options.preset:
        benchmark = Benchmark(options, preset)
        benchmark.run()
        print(markdown(benchmark.results))
        failed = failed or bool(benchmark.results["failures"])
    return 1 if failed else 0


class Benchmark:
    """All rounds over one checkpoint; `results` is what the JSON file holds."""

    def __init__(self, options: argparse.Namespace, preset: str) -> None:
        self._options = options
        self._preset = preset
        self._checkpoint = make_checkpoint(options.checkpoints, preset)
        self._scenarios = scenarios_of(options, preset)
        self.results: dict[str, Any] = {
            "preset": preset,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(),
            "machine": machine.describe() | {"read_bytes_per_s": {}},
            "model": asdict(model_size(self._checkpoint)),
            "settings": settings_of(options.set),
            "seed": options.seed,
            "scenarios": [asdict(scenario) for scenario in self._scenarios],
            "rounds": [],
            "failures": [],
        }

    def run(self) -> None:
        """All rounds, each written when it is complete: an interrupted run keeps those."""
        units = units_of(self._options)
        for number in range(self._options.repeat):
            self._measure_bandwidth()
            order = units if number % 2 == 0 else units[::-1]
            found = self._run_round(order)
            self.results["rounds"].append(
                {unit.label: found[unit.label] for unit in units if unit.label in found}
            )
            self._write()

    def _measure_bandwidth(self) -> None:
        """The best of all rounds counts: it is to be a limit."""
        best = self.results["machine"]["read_bytes_per_s"]
        for threads, rate in machine.read_bandwidth().items():
            best[threads] = max(rate, best.get(threads, 0.0))

    def _run_round(self, order: list[Unit]) -> Round:
        found: Round = {}
        for unit in order:
            read_files(self._checkpoint)
            try:
                found[unit.label] = self._run_unit(unit)
            except SystemFailed as error:
                say(f"{unit.label} FAILED: {error}")
                self.results["failures"].append(f"{unit.label}: {str(error).splitlines()[-1]}")
        return found

    def _run_unit(self, unit: Unit) -> Figures:
        """One system in its process. Raises SystemFailed."""
        spec = {
            **asdict(unit),
            "checkpoint": str(self._checkpoint),
            "scenarios": [asdict(scenario) for scenario in self._scenarios_for(unit)],
            "seed": self._options.seed,
            "settings": self.results["settings"],
        }
        figures: Figures = {}
        begin = time.monotonic()

        def on_message(message: dict[str, Any]) -> None:
            name, found = message["name"], message["figures"]
            figures.update({f"{name}.{figure}": value for figure, value in found.items()})
            shown = " ".join(f"{figure}={value:.4g}" for figure, value in found.items())
            say(f"{time.monotonic() - begin:6.1f} s  {unit.label:22} {name:12} {shown}")

        run_system(self._command(unit), spec, self._options.timeout_s, on_message)
        return figures

    def _scenarios_for(self, unit: Unit) -> list[Scenario]:
        """transformers cannot admit a request while others run."""
        admits = not unit.system.startswith(TRANSFORMERS)
        return [one for one in self._scenarios if admits or one.rate_per_s is None]

    def _command(self, unit: Unit) -> list[str]:
        if unit.system.startswith(VLLM):
            return [self._options.vllm_python, str(HERE / "peer_vllm.py")]
        return [sys.executable, str(HERE / "measure_system.py")]

    def _write(self) -> None:
        """JSON with every round's figures, and the report."""
        folder, name = self._options.output, f"{self._options.name}-{self._preset}"
        (folder / f"{name}.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (folder / f"{name}.md").write_text(markdown(self.results))


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


def commit() -> str:
    """Short hash, with a + when files differ from it; "unknown" outside a repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
