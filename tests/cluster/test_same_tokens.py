"""The same token ids from transformers, inline and the cluster, whatever its shape."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attention.messages import SamplingParams, Submit, TokenOutput
from attention.sampler import SampleRow, sample
from cluster.config import parse_config
from cluster.inline import InlineCluster
from tests.cluster.conftest import RayHarness, Server

NUM_NEW_TOKENS = 16
PRESETS = ("v2lite", "v2", "v3", "kimi", "v3fp8")
SEEDED = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 1234}
SHAPES = (
    {"experts": {"num_workers": 1}, "channel": "tcp"},
    {"experts": {"num_workers": 2, "redundancy": 16}, "router": {"mode": "inline"}},
    {"experts": {"num_workers": 4}, "router": {"num_workers": 2}},
)


def prompts() -> list[list[int]]:
    rng = np.random.Generator(np.random.PCG64(11))
    return [rng.integers(17, 273, n).tolist() for n in (3, 40, 90)]


def transformers_tokens(model: Any, prompt: list[int], sampling: dict[str, Any]) -> list[int]:
    """Our sampler on the logits of transformers, token by token."""
    params = SamplingParams(**sampling)
    ids = list(prompt)
    past = None
    fed = ids
    with torch.no_grad():
        for position in range(NUM_NEW_TOKENS):
            out = model(torch.tensor([fed]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            row = SampleRow(params, position, None, ())
            fed = [sample(out.logits[0, -1:].float().numpy(), [row])[0].token_id]
            ids += fed
    return ids[len(prompt) :]


def inline_tokens(cluster: InlineCluster, prompt: list[int], sampling: dict[str, Any]) -> list[int]:
    """Through the pool that the ingress uses."""
    tokens: list[int] = []
    done = threading.Event()

    def on_output(output: TokenOutput) -> None:
        tokens.extend(output.token_ids)
        if output.finish_reason is not None:
            done.set()

    params = SamplingParams(max_tokens=NUM_NEW_TOKENS, ignore_eos=True, **sampling)
    cluster.ingress.pool.submit(
        Submit(request_id=f"r{id(tokens)}", prompt_ids=prompt, params=params), on_output
    )
    assert done.wait(60)
    return tokens


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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_inline_gives_the_tokens_of_transformers(
    preset: str,
    deterministic: bool,
    hf_model: Callable[[str], Any],
    checkpoint_dir: Callable[[str], Path],
) -> None:
    config = parse_config({"model": str(checkpoint_dir(preset)), "deterministic": deterministic})
    with InlineCluster(config) as cluster:
        for prompt in prompts():
            for sampling in ({"temperature": 0.0}, SEEDED):
                expected = transformers_tokens(hf_model(preset), prompt, sampling)
                assert inline_tokens(cluster, prompt, sampling) == expected


@pytest.mark.ray
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(sorted(map(str, s))))
def test_every_shape_of_the_cluster_gives_the_same_tokens(
    shape: dict[str, Any], ray_harness: RayHarness, hf_model: Callable[[str], Any]
) -> None:
    server = ray_harness.serve("v3", deterministic=True, **shape)
    for prompt in prompts():
        for sampling in ({"temperature": 0.0}, SEEDED):
            expected = transformers_tokens(hf_model("v3"), prompt, sampling)
            assert cluster_tokens(server, prompt, sampling) == expected
