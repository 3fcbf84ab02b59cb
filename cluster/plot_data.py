"""What `shoal plot` draws, as JSON: made from answers of a server, or read from a file. Pure.

Each kind is a dict with its name under "plot", so that a file says what it holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Data = dict[str, Any]

LATENCIES = {
    "ttft_s": "vllm_time_to_first_token_seconds",
    "itl_s": "vllm_inter_token_latency_seconds",
    "e2e_s": "vllm_e2e_request_latency_seconds",
}
"""Name in the data -> histogram in /metrics."""


def experts_data(load: Mapping[str, Any]) -> Data:
    """From the body of GET /v1/experts/load?compact=true."""
    return {"plot": "experts", **load}


def latency_data(before: str, after: str, seconds: float) -> Data:
    """Histograms of what ended between two texts of /metrics; before "": since the start.

    Each is {"bounds": [B], "counts": [B + 1]}; the last count is of what is above all bounds. One
    that `after` has not: [] and [].
    """
    old, new = _histograms(before), _histograms(after)
    histograms = {name: _difference(old[series], new[series]) for name, series in LATENCIES.items()}
    return {"plot": "latency", "seconds": seconds, "histograms": histograms}


def _histograms(text: str) -> defaultdict[str, dict[float, float]]:
    """Of each series of LATENCIES: upper bound -> values up to it, of all label sets together."""
    from prometheus_client.parser import text_string_to_metric_families

    found: defaultdict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        if family.name in LATENCIES.values():
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    found[family.name][float(sample.labels["le"])] += sample.value
    return found


def _difference(before: Mapping[float, float], after: Mapping[float, float]) -> Data:
    """A server that started anew meanwhile has fewer than before: then all it has is new."""
    bounds = sorted(after)
    up_to = [after[bound] for bound in bounds]
    if all(after[bound] >= before.get(bound, 0) for bound in bounds):
        up_to = [after[bound] - before.get(bound, 0) for bound in bounds]
    counts = [int(high - low) for low, high in zip([0.0, *up_to], up_to, strict=False)]
    return {"bounds": bounds[:-1], "counts": counts}


def scaling_data(model: str, samples: Sequence[Data]) -> Data:
    """From samples of `scaling_sample`."""
    return {"plot": "scaling", "model": model, "samples": list(samples)}


def scaling_sample(at_s: float, status: Mapping[str, Any] | None) -> Data:
    """One moment, from a body of /status; None: the server was away, so nothing is known."""
    status = status or {}
    busy: defaultdict[str, list[float]] = defaultdict(list)
    for worker in status.get("workers", ()):
        if worker.get("busy") is not None:
            busy[worker["role"]].append(worker["busy"])
    rates = status.get("rates") or {}
    return {
        "at_s": round(at_s, 3),
        "tiers": status.get("tiers") or {},
        "busy": {role: fmean(values) for role, values in busy.items()},
        "generated_tokens_per_s": rates.get("generated_tokens_per_s"),
    }
