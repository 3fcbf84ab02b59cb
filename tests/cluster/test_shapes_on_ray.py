"""Shapes of the cluster on a real Ray that believes in one GPU: the same tokens from each; who
reserves the GPU, who looks for it, who fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.cluster.conftest import RayHarness, Server
from tests.cluster.test_same_tokens import NUM_NEW_TOKENS, Answer, transformers_answers

pytestmark = pytest.mark.ray
without_cuda = pytest.mark.skipif(
    torch.version.cuda is not None, reason="this torch may find the GPU"
)
NO_CUDA = "this torch was built without CUDA"
ONE_GPU: dict[str, Any] = {
    "device": "cpu" if torch.version.cuda else "auto",
    "experts": {"num_workers": 1},
    "channel": "tcp",
}
SHAPES = {
    "one expert worker, tcp": ONE_GPU,
    "router inline": {
        "experts": {"num_workers": 2, "redundancy": 16},
        "router": {"mode": "inline"},
    },
    "two routers": {"experts": {"num_workers": 4}, "router": {"num_workers": 2}},
}


@pytest.fixture(scope="module")
def answers(hf_model: Callable[[str], Any]) -> list[Answer]:
    return transformers_answers(hf_model("v3"))


def cluster_tokens(server: Server, prompt: list[int], sampling: dict[str, Any]) -> list[int]:
    """Over HTTP with token ids in and out."""
    body = {
        "prompt": prompt,
        "max_tokens": NUM_NEW_TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
        **sampling,
    }
    choice = server.post("/v1/completions", body)["choices"][0]
    return list(choice["token_ids"])


@without_cuda
def test_two_workers_share_a_gpu_unasked_and_a_router_leaves_it_alone(
    ray_harness: RayHarness,
) -> None:
    server = ray_harness.serve("v3", deterministic=True, **ONE_GPU)
    told = "1 GPU to divide among 2 attention and expert workers: num_gpus 0.5 each"
    assert ray_harness.local.gpus == told
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


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_the_cluster_gives_the_same_tokens(
    shape: str, ray_harness: RayHarness, answers: list[Answer]
) -> None:
    server = ray_harness.serve("v3", deterministic=True, **SHAPES[shape])
    for prompt, sampling, expected in answers:
        assert cluster_tokens(server, prompt, sampling) == expected


@without_cuda
def test_a_worker_that_must_have_a_gpu_says_in_a_line_why_it_cannot(
    ray_harness: RayHarness,
) -> None:
    halves = {"attention": {"num_gpus": 0.5}, "experts": {"num_workers": 1, "num_gpus": 0.5}}
    told = ray_harness.refusal("v3", device="cuda", **halves)
    assert told == f"device cuda: {NO_CUDA}; use --device cpu, or auto"
