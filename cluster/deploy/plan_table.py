"""A plan for people: what fits where, bounds, what limits them, lines for deploy.yaml."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.deploy.layout import Layout
from cluster.deploy.plan import REPORTED, Plan, colocated_traffic_limit
from cluster.deploy.plan_report import FORMULAS, as_dict


def render(plan: Plan) -> Group:
    """Within 80 columns."""
    setting, data = plan.setting, as_dict(plan)
    title = (
        f"{setting.sizes.name} ({setting.sizes.weights}) on {plan.nodes} {setting.gpu.name}, "
        f"{setting.network.name}: {setting.context_tokens:,} tokens of context, "
        f"{setting.tpot_s * 1e3:g} ms a token"
    )
    warning = (
        f"Bounds at full efficiency, not promises: running systems report {REPORTED[0] * 100:.0f}-"
        f"{REPORTED[1] * 100:.0f} % of them."
    )
    return Group(
        Text(title, "bold"),
        Text(warning, "yellow"),
        Text(),
        _tiers(plan, data),
        Text(),
        *_ratio(plan, data["token"]),
        Text(),
        _layouts(plan),
        *_reasons(plan),
        *_deploy(data["suggestion"]),
        Text(),
        Text("Formulas and sources", "bold"),
        *_sources(plan),
    )


def _tiers(plan: Plan, data: dict[str, Any]) -> Table:
    """What one GPU of each tier holds and how long it takes for a token."""
    sizes, token = plan.setting.sizes, data["token"]
    layout = plan.split or plan.colocated
    slots, cache = layout.slots_per_worker, plan.cache_tokens(layout)
    fewest = plan.min_expert_gpus
    table = Table("one GPU", "attention", "experts", box=None)
    table.add_row(
        "weights",
        _gb(sizes.attention_worker_bytes()),
        f"{_gb(sizes.expert_worker_bytes(slots))} ({slots} of {sizes.num_experts_total:,} experts)",
    )
    table.add_row(
        "cache",
        f"{_gb(cache * sizes.cache_bytes_per_token())}, {_short(cache)} tokens",
        "none",
    )
    table.add_row(
        "one token", f"{token['attention_s'] * 1e6:.1f} us", f"{token['expert_s'] * 1e6:.1f} us"
    )
    table.add_row(
        "fewest GPUs",
        "1",
        f"{fewest}, for {_gb(data['memory']['experts_bytes'])}" if fewest else "no number of these",
    )
    return table


def _ratio(plan: Plan, token: dict[str, Any]) -> Iterable[Text]:
    bound = token["compute_bound_tokens_per_s_per_gpu"]
    yield Text(
        f"{plan.gpu_ratio:.2f} attention GPUs keep an expert GPU busy; computing alone allows "
        f"{_short(bound)} tokens/s a GPU, prefill {_short(1 / token['prefill_s'])}."
    )
    if plan.useful_gpu_ratio < plan.gpu_ratio:
        yield Text(
            f"The port of an expert GPU lets {_short(plan.port_limit)} tokens/s through, which "
            f"{plan.useful_gpu_ratio:.2f} attention GPUs make."
        )


def _layouts(plan: Plan) -> Table:
    table = Table("", "GPUs", "sequences", "step", "tokens/s a GPU", "$ per 1M", "limit", box=None)
    for name, layout in plan.layouts.items():
        table.add_row(*_layout_row(plan, name, layout))
    if plan.suggestion is not None and plan.suggestion.layout != plan.split:
        table.add_row(*_layout_row(plan, "whole nodes", plan.suggestion.layout))
    return table


def _layout_row(plan: Plan, name: str, layout: Layout) -> list[str]:
    pool, cost = layout.pool, plan.cost_per_million(layout)
    gpus = f"{pool.attention_gpus} + {pool.expert_gpus}" if pool.is_split else str(pool.num_gpus)
    if cost is None:
        return [name, gpus, "-", "-", "-", "-", layout.limit]
    return [
        name,
        gpus,
        f"{layout.sequences} in {layout.micro_batches}",
        f"{layout.step_s * 1e3:.1f} ms",
        f"<= {_short(layout.tokens_per_s_per_gpu)}",
        f">= {cost:.3g}",
        layout.limit,
    ]


def _reasons(plan: Plan) -> Iterable[Text]:
    """What limits each layout, and what is left of its bound where it is reached as reported."""
    low, high = REPORTED
    for name, layout in plan.layouts.items():
        yield Text(f"{name}: {layout.why}")
        rate, cost = layout.tokens_per_s_per_gpu, plan.cost_per_million(layout)
        if cost is not None:
            yield Text(
                f"  at {low * 100:.0f}-{high * 100:.0f} %: {_short(low * rate)}-"
                f"{_short(high * rate)} tokens/s a GPU, ${cost / high:.3g}-{cost / low:.3g} per 1M"
            )
    traffic = colocated_traffic_limit(plan.setting, plan.colocated.pool)
    if traffic < plan.colocated.tokens_per_s_per_gpu:
        yield Text(
            f"colocated is generous: ports that dispatch and return at once allow {_short(traffic)}"
        )


def _deploy(suggestion: dict[str, Any] | None) -> Iterable[RenderableType]:
    if suggestion is None:
        return
    yield Text()
    yield Text("For deploy.yaml", "bold")
    deploy = yaml.safe_dump(suggestion["deploy"], sort_keys=False, default_flow_style=None)
    yield Text(deploy.rstrip())
    yield Text(
        f"({suggestion['slots_per_worker']} slots a worker, "
        f"{_short(suggestion['cache_tokens_per_attention_gpu'])} tokens of cache)"
    )


def _sources(plan: Plan) -> Iterable[Text]:
    yield Text(f"{plan.setting.gpu.name}: {plan.setting.gpu.source}", "dim")
    yield Text(f"{plan.setting.network.name}: {plan.setting.network.source}", "dim")
    for name, formula, source in FORMULAS:
        yield Text(f"{name}: {formula} [{source}]", "dim")


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _short(value: float) -> str:
    """Three digits: 7.38k, 1.49M, 349."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
