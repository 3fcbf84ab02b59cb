"""The Markdown of a run of `bench_autoscale.py`, from its settings and figures."""

from __future__ import annotations

from typing import Any

from autoscale.figures import TPOT_SLACK, TTFT_SLACK

GOAL_SAVED = 0.375
"""EaaS reports 37.5 % fewer GPUs than a static peak."""
TOLERANCE = 0.01
"""Attainment that much below the static peak's still counts as the same."""


def markdown(run: dict[str, Any]) -> str:
    """Head, figures of each run, the goal."""
    return "\n\n".join([_head(run), _table(run), *_goal(run)]) + "\n"


def _head(run: dict[str, Any]) -> str:
    machine, fleet, bounds = run["machine"], run["fleet"], run["bounds"]
    return "\n".join(
        [
            "# A day of traffic on a tier of experts that scales",
            "",
            f"{run['date']}, commit {run['commit']}, {machine['cpu']}, {machine['cores']} cores, "
            f"load before {machine['load_average']:.2f}.",
            "",
            f"24 hours in {run['day_s']:.0f} s, peak {run['peak_tokens_per_s']:g} tokens/s, "
            f"{run['num_requests']} requests, seed {run['seed']}; devices of "
            f"{fleet['pairs_per_s']:.0f} (token, expert) pairs/s, {fleet['num_devices']} of them "
            f"carry the peak at {fleet['target_busy']:.0%} busy. Service level: TTFT <= "
            f"{bounds['ttft_s'] * 1e3:.0f} ms and <= {bounds['tpot_s'] * 1e3:.0f} ms a token "
            f"({TTFT_SLACK:g} and {TPOT_SLACK:g} times the static peak's p95).",
        ]
    )


def _table(run: dict[str, Any]) -> str:
    columns = ["device-seconds", "saved", "serving", "most", "in time", "TTFT", "ms/token"]
    columns += ["tokens/s", "failed", "CPU", "CPU p95", "waiting for a core"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(_row(run, name) for name in run["runs"])])


def _row(run: dict[str, Any], name: str) -> str:
    found = run["runs"][name]["figures"]
    cells = [
        run["runs"][name]["title"],
        f"{found['device_seconds']:.0f}",
        f"{saved(run, name):.1%}",
        f"{found['serving_device_seconds']:.0f}",
        f"{found['most_devices']}",
        f"{found['attainment']:.2%}",
        f"{found['ttft_ms']['p50']:.0f} / {found['ttft_ms']['p95']:.0f}",
        f"{found['tpot_ms']['p50']:.0f} / {found['tpot_ms']['p95']:.0f}",
        f"{found['output_tokens_per_s']:.1f}",
        f"{found['num_failed']}",
        f"{found['cpu_mean']:.0%}",
        f"{found['cpu_p95']:.0%}",
        f"{found['pressure_mean']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def saved(run: dict[str, Any], name: str) -> float:
    """Part of the static peak's device-seconds that this way does without."""
    used = {key: one["figures"]["device_seconds"] for key, one in run["runs"].items()}
    return 1 - used[name] / used["static"]


def _goal(run: dict[str, Any]) -> list[str]:
    if "shoal" not in run["runs"]:
        return []
    level = {name: one["figures"]["attainment"] for name, one in run["runs"].items()}
    share = saved(run, "shoal")
    met = share >= GOAL_SAVED and level["shoal"] >= level["static"] - TOLERANCE
    text = (
        f"Goal, at least {GOAL_SAVED:.1%} saved at the same service level (within "
        f"{TOLERANCE:.0%}): {share:.1%}, {level['shoal']:.2%} against {level['static']:.2%} in "
        f"time: {'met' if met else 'missed'}."
    )
    return [
        "*serving*: device-seconds of workers that hold experts; *device-seconds* also count them "
        "while they start and stop. TTFT and ms/token: p50 / p95. CPU: of all cores.",
        text,
    ]
