"""A plan as data: what `shoal plan --json` prints, and the formulas with their sources."""

from __future__ import annotations

from math import isfinite
from typing import Any, NamedTuple

from cluster.deploy import token_costs
from cluster.deploy.hardware import USABLE_FRACTION
from cluster.deploy.layout import Layout
from cluster.deploy.plan import REPORTED, Plan, Suggestion, colocated_traffic_limit

MAX_NUM_SEQS = 4096
"""The most that an attention engine can be told to run."""
TOKEN_BUDGET = 512
"""Of an engine's step unless more sequences run."""


class Formula(NamedTuple):
    name: str
    formula: str
    source: str


FORMULAS = (
    Formula("sizes", "shapes of the matrices x bytes of their type", "the model's config.json"),
    Formula(
        "usable memory",
        f"{USABLE_FRACTION:.0%} of the GPU's",
        "assumed; the rest is for driver, kernels, activations",
    ),
    Formula(
        "attention time",
        "2 FLOP x parameters / FLOP/s + context x max(FLOP / FLOP/s, cache bytes / bandwidth)",
        "arithmetic: absorbed latent attention, bf16; head in bf16",
    ),
    Formula(
        "expert time",
        "max(2 FLOP x parameters / FLOP/s, bytes of the experts touched / bandwidth)",
        "arithmetic; T random tokens touch E (1 - (1 - k/E)^T) of E experts",
    ),
    Formula("GPU ratio", "attention time / expert time", "arithmetic"),
    Formula("compute bound", "1 / (attention time + expert time)", "arithmetic"),
    Formula(
        "traffic",
        "layers x devices x (hidden state out, in the weights' type; bf16 sum back)",
        "this protocol: one copy and one sum for each device a token's experts are on",
    ),
    Formula(
        "step",
        "max(busiest GPU, busiest port, one round trip) over 1, 2 or 3 micro-batches",
        "pipeline arithmetic: even load and perfect overlap are assumed",
    ),
    Formula(
        "cost",
        "price of a GPU hour / (3600 x tokens/s per GPU)",
        "--price; 2.0 unless given, what DeepSeek assumed for an H800 (open-infra-index day 6)",
    ),
    Formula(
        "reported reality",
        f"{REPORTED[0]:.0%}-{REPORTED[1]:.0%} of such bounds",
        "DeepSeek, open-infra-index day 6: 14.8k output tokens/s on 8 H800 at 4,989 tokens of "
        "context, against the compute bound",
    ),
)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Plain values; sizes in bytes, times in seconds, rates in tokens/s."""
    setting = plan.setting
    return {
        "model": _model(plan),
        "gpu": {
            "name": setting.gpu.name,
            "memory_bytes": setting.gpu.memory_bytes,
            "usable_bytes": setting.gpu.usable_bytes,
            "bandwidth_bytes_per_s": setting.gpu.bandwidth_bytes_per_s,
            "bf16_flops_per_s": setting.gpu.bf16_flops_per_s,
            "fp8_flops_per_s": setting.gpu.fp8_flops_per_s,
            "source": setting.gpu.source,
        },
        "network": setting.network.__dict__,
        "nodes": {"count": plan.nodes.count, "gpus_per_node": plan.nodes.gpus},
        "context_tokens": setting.context_tokens,
        "tpot_s": setting.tpot_s,
        "price_per_gpu_hour": plan.price_per_gpu_hour,
        "token": _token(plan),
        "memory": _memory(plan),
        "layouts": {name: _layout(plan, layout) for name, layout in plan.layouts.items()},
        "suggestion": _suggestion(plan, plan.suggestion) if plan.suggestion else None,
        "reported_share_of_bound": list(REPORTED),
        "formulas": [formula._asdict() for formula in FORMULAS],
    }


def _model(plan: Plan) -> dict[str, Any]:
    sizes = plan.setting.sizes
    return {
        "name": sizes.name,
        "weights": sizes.weights,
        "total_params": sizes.total_params,
        "active_params": sizes.active_params,
        "routed_params": sizes.routed_params,
        "num_experts_total": sizes.num_experts_total,
        "expert_bytes": sizes.expert_bytes,
        "attention_side_bytes": sizes.attention_side_bytes,
        "cache_bytes_per_token": sizes.cache_bytes_per_token(),
        "flops_per_token": sizes.flops_per_token,
        "core_flops_per_context_token": sizes.core_flops_per_context_token(),
    }


def _token(plan: Plan) -> dict[str, Any]:
    """What one token costs at full efficiency."""
    sizes, gpu, context = plan.setting.sizes, plan.setting.gpu, plan.setting.context_tokens
    return {
        "attention_s": token_costs.attention_s(sizes, gpu, context),
        "expert_s": token_costs.expert_s(sizes, gpu),
        "prefill_s": token_costs.prefill_s(sizes, gpu, context),
        "compute_bound_tokens_per_s_per_gpu": token_costs.decode_bound(sizes, gpu, context),
        "attention_gpus_per_expert_gpu": plan.gpu_ratio,
        "attention_gpus_per_expert_gpu_within_port": plan.useful_gpu_ratio,
        "dispatch_bytes": token_costs.dispatch_bytes(sizes),
        "return_bytes": token_costs.return_bytes(sizes),
        "port_tokens_per_s": _finite(plan.port_limit),
        "tokens_to_fill_experts": token_costs.tokens_to_fill(sizes, gpu),
    }


def _memory(plan: Plan) -> dict[str, Any]:
    sizes = plan.setting.sizes
    return {
        "attention_gpu_weights_bytes": sizes.attention_worker_bytes(),
        "experts_bytes": sizes.expert_worker_bytes(sizes.num_experts_total),
        "min_expert_gpus": plan.min_expert_gpus,
    }


def _layout(plan: Plan, layout: Layout) -> dict[str, Any]:
    pool = layout.pool
    limit = colocated_traffic_limit(plan.setting, pool) if not pool.is_split else float("inf")
    return {
        "attention_gpus": pool.attention_gpus,
        "expert_gpus": pool.expert_gpus,
        "tokens_per_s_per_gpu": layout.tokens_per_s_per_gpu,
        "cost_per_million_tokens": plan.cost_per_million(layout),
        "limit": layout.limit,
        "why": layout.why,
        "sequences_per_attention_gpu": layout.sequences,
        "micro_batches": layout.micro_batches,
        "step_s": layout.step_s,
        "cache_tokens_per_attention_gpu": plan.cache_tokens(layout),
        "slots_per_worker": layout.slots_per_worker,
        "both_ways_traffic_tokens_per_s_per_gpu": _finite(limit),
    }


def _suggestion(plan: Plan, suggestion: Suggestion) -> dict[str, Any]:
    """Under `deploy`: the same keys as in deploy.yaml."""
    gpu = plan.setting.gpu.name
    (attention_gpus, expert_gpus), (attention_pods, expert_pods) = (
        suggestion.gpus_per_pod,
        suggestion.pods,
    )
    experts = {"gpu": gpu, "gpus_per_pod": expert_gpus, "pods": expert_pods}
    running = min(suggestion.layout.sequences, MAX_NUM_SEQS)
    engine = {"max_num_seqs": running, "max_num_batched_tokens": max(running, TOKEN_BUDGET)}
    return {
        "deploy": {
            "attention": {"gpu": gpu, "gpus_per_pod": attention_gpus, "pods": attention_pods},
            "experts": experts | {"redundancy": suggestion.redundancy},
            "settings": {"attention": {"engine": engine}},
        },
        "slots_per_worker": suggestion.slots_per_worker,
        "cache_tokens_per_attention_gpu": plan.cache_tokens(suggestion.layout),
        "layout": _layout(plan, suggestion.layout),
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
