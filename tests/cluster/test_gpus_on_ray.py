"""Devices on a real Ray that believes in one GPU: who reserves it, who looks for it, who fails."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.cluster.conftest import RayHarness

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch may find the GPU"),
]

NO_CUDA = "this torch was built without CUDA"


def test_two_workers_share_a_gpu_unasked_and_a_router_leaves_it_alone(
    ray_harness: RayHarness,
) -> None:
    server = ray_harness.serve("v3", device="auto", experts={"num_workers": 1})
    told = "1 GPU to divide among 2 attention and expert workers: num_gpus 0.5 each"
    assert ray_harness.local.gpus == told
    answer = server.post("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 4})
    assert answer["usage"]["completion_tokens"] == 4
    chosen = {}
    for worker in server.get("/status")["workers"]:
        if worker["role"] in ("attention", "experts", "router"):
            lines = re.findall(r'device: (.*)"', ray_harness.log_of(worker["worker_id"]))
            chosen[worker["role"]] = lines
    on_gpu_0 = [f"CPU: {NO_CUDA} (CUDA_VISIBLE_DEVICES=0)"]
    assert chosen == {
        "attention": on_gpu_0,
        "experts": on_gpu_0,
        "router": ["CPU: no GPU is reserved for this worker"],
    }


def test_a_worker_that_must_have_a_gpu_says_in_a_line_why_it_cannot(
    ray_harness: RayHarness,
) -> None:
    halves = {"attention": {"num_gpus": 0.5}, "experts": {"num_workers": 1, "num_gpus": 0.5}}
    told = ray_harness.refusal("v3", device="cuda", **halves)
    assert told == f"device cuda: {NO_CUDA}; use --device cpu, or auto"
