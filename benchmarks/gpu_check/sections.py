"""The sections of a run: what `--sections` takes, in order, and the time of each."""

from collections.abc import Sequence
from itertools import accumulate

SECTIONS = {
    "ceilings": "gpu_check.ceilings",
    "experts": "gpu_check.check_experts",
    "router": "gpu_check.check_router",
    "attention": "gpu_check.check_attention",
    "expert-times": "gpu_check.bench_experts",
    "router-times": "gpu_check.bench_router",
    "attention-times": "gpu_check.bench_attention",
    "decode": "gpu_check.decode",
    "hops": "gpu_check.hops",
    "ray": "gpu_check.on_ray",
}
"""Module of each; its `units(context)` lists the units of work."""

SHARES = {
    "ceilings": 3,
    "experts": 19,
    "router": 7,
    "attention": 17,
    "expert-times": 8,
    "router-times": 4,
    "attention-times": 8,
    "decode": 14,
    "hops": 6,
    "ray": 14,
}
"""Of the time, to each other. On a fresh machine most of a check is the compiling of its kernel;
Ray starts three processes that compile."""


def ends_of(sections: Sequence[str], begin_s: float, deadline_s: float) -> list[float]:
    """When each has to be over. What one leaves of its share, those after it have."""
    sums = list(accumulate(SHARES[section] for section in sections))
    return [begin_s + (deadline_s - begin_s) * total / sums[-1] for total in sums]
