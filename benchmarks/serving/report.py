"""The Markdown of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from serving.goals import bandwidth_share, goals
from serving.results import BASES, Figures, Round, medians, ratios

GB = 1e9
MISSING = "-"


def markdown(run: dict[str, Any]) -> str:
    """The report of the dict that is written as JSON."""
    middle = medians(run["rounds"])
    against = {name: ratios(run["rounds"], base) for name, base in BASES.items()}
    scenarios = [scenario["name"] for scenario in run["scenarios"]]
    parts = [
        _head(run),
        _throughput("Tokens/s", middle, scenarios, ".1f"),
        *(
            _throughput(f"Tokens/s relative to {name}", found, scenarios, ".2f")
            for name, found in against.items()
            if found
        ),
        _latency("Time to first token, ms (p50 / p99)", "ttft", middle, scenarios),
        _latency("Time between tokens, ms (p50 / p99)", "itl", middle, scenarios),
        _start_and_memory(run, middle),
        _goals(run, middle, against),
        _failures(run["failures"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(run: dict[str, Any]) -> str:
    machine, model = run["machine"], run["model"]
    bandwidth = ", ".join(
        f"{rate / GB:.1f} GB/s with {threads} thread{'' if threads == '1' else 's'}"
        for threads, rate in machine["read_bytes_per_s"].items()
    )
    return "\n".join(
        [
            f"# Serving benchmark, checkpoint `{run['preset']}`",
            "",
            f"{run['date']}, commit {run['commit']}, medians of {len(run['rounds'])} rounds, "
            f"{max(one['new_tokens'] for one in run['scenarios'])} new tokens a request; "
            f"Shoal's settings: "
            f"`{json.dumps(run['settings'])}`.",
            "",
            f"- {machine['cpu']}, {machine['cores']} cores, L3 {machine['l3']}, "
            f"{machine['memory_gb']} GB; {' '.join(machine['isa'])}; load before the first round "
            f"{machine['load_average']:.2f}",
            f"- memory reads: {bandwidth}",
            f"- checkpoint: {model['num_parameters'] / 1e6:.1f}M parameters, "
            f"{model['file_bytes'] / GB:.3f} GB, "
            f"{model['active_bytes'] / GB:.3f} GB active a token",
        ]
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"## {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _throughput(title: str, figures: Round, scenarios: Sequence[str], form: str) -> str:
    def cell(found: Figures, scenario: str) -> str:
        kind = "prefill" if scenario.startswith("prefill-") else "output"
        return _number(found.get(f"{scenario}.{kind}_tokens_per_s"), form)

    return _by_scenario(title, figures, scenarios, cell)


def _latency(title: str, kind: str, figures: Round, scenarios: Sequence[str]) -> str:
    def cell(found: Figures, scenario: str) -> str:
        half, tail = (found.get(f"{scenario}.{kind}_p{percent}_ms") for percent in (50, 99))
        return MISSING if half is None else f"{_number(half, '.1f')} / {_number(tail, '.1f')}"

    if kind == "itl":
        scenarios = [name for name in scenarios if not name.startswith("prefill-")]
    return _by_scenario(title, figures, scenarios, cell)


def _by_scenario(
    title: str, figures: Round, scenarios: Sequence[str], cell: Callable[[Figures, str], str]
) -> str:
    rows = [
        [system, *(cell(found, scenario) for scenario in scenarios)]
        for system, found in figures.items()
    ]
    return _table(title, scenarios, rows)


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _start_and_memory(run: dict[str, Any], figures: Round) -> str:
    columns = ["ready, s", "first answer, s", "peak PSS, GB", "peak RSS, GB", "peak PSS / file"]
    show_share = run["preset"] == "lite"
    if show_share:
        columns.append("decode at 1, share of the bandwidth")
    file_bytes, active_bytes = run["model"]["file_bytes"], run["model"]["active_bytes"]
    rows = []
    for system, found in figures.items():
        pss = found.get("memory.peak_pss_bytes")
        rss = found.get("memory.peak_rss_bytes")
        row = [
            system,
            _number(found.get("start.ready_s"), ".1f"),
            _number(found.get("start.first_answer_s"), ".1f"),
            _number(None if pss is None else pss / GB, ".2f"),
            _number(None if rss is None else rss / GB, ".2f"),
            _number(None if pss is None else pss / file_bytes, ".2f"),
        ]
        if show_share:
            row.append(_number(bandwidth_share(found, active_bytes, best_bandwidth(run)), ".2f"))
        rows.append(row)
    return _table("Start and memory", columns, rows)


def best_bandwidth(run: dict[str, Any]) -> float:
    """Bytes/s with the number of threads that reads fastest."""
    return float(max(run["machine"]["read_bytes_per_s"].values()))


def _goals(run: dict[str, Any], middle: Round, against: dict[str, Round]) -> str:
    model = run["model"]
    found = goals(
        run["preset"],
        middle,
        against,
        model["file_bytes"],
        model["active_bytes"],
        best_bandwidth(run),
    )
    rows = [
        [
            goal.name,
            f"{goal.value:.2f}",
            f"{'>=' if goal.at_least else '<='} {goal.limit:g}",
            "met" if goal.met else "missed",
        ]
        for goal in found
    ]
    return _table("Goals", ["measured", "goal", ""], rows) if rows else ""


def _failures(failures: Sequence[str]) -> str:
    return "\n".join(["## Failed", "", *(f"- {text}" for text in failures)]) if failures else ""
