"""The sections of a run: what `--sections` takes, in the order in which they run."""

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
