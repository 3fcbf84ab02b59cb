"""The reference model of the tests against transformers, and against itself in other forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference import Golden, Reference, prompts

EOS = 1
ALL_PRESETS = ("v2-lite", "v2", "v3", "kimi-k2", "v3fp8")
MAX_LOGIT_ERROR = 2e-4  # 5 times what was measured; logits have a standard deviation of 3


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_logits_are_those_of_transformers(
    preset: str, checkpoint_dir: Callable[[str], Path], hf_model: Callable[[str], Any]
) -> None:
    reference, model = Reference(checkpoint_dir(preset)), hf_model(preset)
    for ids in prompts():
        reference.reset()
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0]
        assert (reference.forward(ids) - theirs).abs().max() <= MAX_LOGIT_ERROR


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_greedy_tokens_are_those_of_transformers(
    preset: str,
    reference_golden: Callable[[str], list[Golden]],
    hf_model: Callable[[str], Any],
) -> None:
    for golden in reference_golden(preset):
        ours = golden.greedy[:12]
        if EOS in ours:
            ours = ours[: ours.index(EOS)]
        out = hf_model(preset).generate(
            torch.tensor([golden.ids]),
            attention_mask=torch.ones(1, len(golden.ids), dtype=torch.long),
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=12,
        )
        theirs = out[0, len(golden.ids) :].tolist()
        assert theirs[: len(ours)] == ours


@pytest.mark.parametrize("preset", [*ALL_PRESETS, "v3fp8-ragged"])
def test_absorbed_chunks_equal_naive_in_float64(
    preset: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    ids = prompts()[2]
    naive = Reference(checkpoint_dir(preset), torch.float64)
    absorbed = Reference(checkpoint_dir(preset), torch.float64, absorbed=True)
    chunks = [absorbed.forward(ids[start : start + 16]) for start in range(0, len(ids), 16)]
    assert (torch.cat(chunks) - naive.forward(ids)).abs().max() <= 1e-11


def test_bfloat16_follows_float32_when_the_routes_are_held(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    ids = prompts()[2]
    exact = Reference(checkpoint_dir("v2-lite"))
    logits = exact.forward(ids)
    rounded = Reference(checkpoint_dir("v2-lite"), torch.bfloat16)
    rounded.forced_routes = {layer: parts[0][0] for layer, parts in exact.routes.items()}
    error = (rounded.forward(ids).float() - logits).norm() / logits.norm()
    assert 1e-3 < error < 6e-2


def test_golden_has_the_shapes_it_promises(reference_golden: Callable[[str], list[Golden]]) -> None:
    golden = reference_golden("v3")[2]
    assert len(golden.ids) == 64 and len(golden.greedy) == 24
    assert golden.logits.shape == (4, 512)
    assert golden.latent.shape == (64, 96 + 32)
    assert sorted(golden.routes) == [1, 2, 3]  # the first of 4 layers is dense
    assert golden.routes[1][0].shape == golden.routes[1][1].shape == (64, 4)
    assert golden.token_margin.shape == (64,) and (golden.token_margin > 1e-5).all()
