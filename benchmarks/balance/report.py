"""The Markdown of a run of `bench_balance.py`, from the dict that is written as JSON."""

from __future__ import annotations

from typing import Any

GOAL_IMBALANCE = 0.11
GOAL_COST = 0.01
MAX_STEPS = 3


def markdown(run: dict[str, Any]) -> str:
    """Head, one table of traffic that stays, one of domains, one of shifts, the cost."""
    parts = [_head(run), _steps("Skewed traffic", run["zipf"]), *_domains(run), _cost(run["cost"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(run: dict[str, Any]) -> str:
    machine = run["machine"]
    return "\n".join(
        [
            "# Balance of the expert workers",
            "",
            f"{run['date']}, commit {run['commit']}, {machine['cpu']}, {machine['cores']} cores, "
            f"load before {machine['load_average']:.2f}.",
            "",
            "Imbalance is (max - mean) / mean of the workers' rows: mean over the layers / worst "
            "layer / of the totals. Each step plans with one window of traffic and is judged on "
            f"the next. Goal: mean over the layers <= {GOAL_IMBALANCE} after at most {MAX_STEPS} "
            "steps. TensorRT-LLM's 1.564 -> 0.109 (DeepSeek-R1, 32 ranks, 288 slots a layer) is "
            "the mean over the layers too. *EPLB anew*: DeepSeek's planner with the same slots, "
            "every one loaded afresh, where they divide evenly.",
        ]
    )


def _domains(run: dict[str, Any]) -> list[str]:
    found = [_steps("Default model, measured routing", run["domains"])]
    if run["shifts"]:
        found.append(_steps("Default model, the domain changes", run["shifts"]))
    return found


def _steps(title: str, cases: list[dict[str, Any]]) -> str:
    if not cases:
        return ""
    columns = ["redundant", *("before", *(f"step {n}" for n in range(1, MAX_STEPS + 1)))]
    columns += ["slots loaded", "ms a step", "goal", "EPLB anew"]
    lines = [f"## {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *map(_case, cases)])


def _case(case: dict[str, Any]) -> str:
    steps = case["steps"]
    met = steps[-1]["mean_layer"] <= GOAL_IMBALANCE
    cells = [
        f"{case['pool']}, {case['traffic']}",
        f"{case['redundant_share']:.1%}",
        *map(_imbalance, steps),
        " + ".join(str(step["num_loads"]) for step in steps[1:]),
        " / ".join(f"{step['seconds'] * 1e3:.0f}" for step in steps[1:]),
        "met" if met else "missed",
        _imbalance(case["eplb"]) if case["eplb"] else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _imbalance(found: dict[str, float]) -> str:
    return " / ".join(f"{found[name]:.3f}" for name in ("mean_layer", "worst_layer", "total"))


def _cost(cost: dict[str, Any] | None) -> str:
    if cost is None:
        return ""
    low, high = cost["interval"]
    parts = cost["accounted"]
    verdict = "met" if high <= GOAL_COST else "missed" if low > GOAL_COST else "too close to tell"
    if high - low > 2 * GOAL_COST:
        verdict = "too noisy to tell"
    return "\n".join(
        [
            "## Cost of counting and balancing (default model, one process, 8 streams)",
            "",
            f"- paired rounds: {cost['median']:+.2%} of throughput in the median of "
            f"{len(cost['tokens_per_s'])} pairs, 95 % confidence {low:+.2%} to {high:+.2%} "
            f"(goal <= {GOAL_COST:.0%}: {verdict})",
            f"- accounted: {cost['share']:.2%} of a core: counting {parts['add_us']:.1f} us a "
            f"batch of {parts['batch_us']:.0f} us ({parts['batches_per_s']:.0f} batches/s), "
            f"{parts['report_us']:.0f} us a worker and second, {parts['plan_us']:.0f} us every "
            f"{parts['rebalance_every_s']:.0f} s",
        ]
    )
