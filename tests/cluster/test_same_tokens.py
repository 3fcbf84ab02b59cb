"""The same token ids from transformers and inline; from the cluster: test_shapes_on_ray.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attention.messages import SamplingParams, Submit, TokenOutput
from attention.sampler import SampleRow, sample
from cluster.config import parse_config
from cluster.inline import InlineCluster

NUM_NEW_TOKENS = 16
PRESETS = ("v2-lite", "v2", "v3", "kimi-k2", "v3fp8")
Answer = tuple[list[int], dict[str, Any], list[int]]
"""A prompt, how to sample, and the tokens of transformers."""
SEEDED = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 1234}


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


def transformers_answers(model: Any) -> list[Answer]:
    """To every prompt, greedy and seeded."""
    asked = product(prompts(), ({"temperature": 0.0}, SEEDED))
    return [(prompt, how, transformers_tokens(model, prompt, how)) for prompt, how in asked]


@pytest.mark.parametrize("preset", PRESETS)
def test_inline_gives_the_tokens_of_transformers(
    preset: str, hf_model: Callable[[str], Any], checkpoint_dir: Callable[[str], Path]
) -> None:
    answers = transformers_answers(hf_model(preset))
    for deterministic in (False, True):
        settings = {"model": str(checkpoint_dir(preset)), "deterministic": deterministic}
        with InlineCluster(parse_config(settings)) as cluster:
            for prompt, sampling, expected in answers:
                assert inline_tokens(cluster, prompt, sampling) == expected
