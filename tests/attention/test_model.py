"""Logits of the decoder against two independent witnesses, in every form and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.attention.harness import Rig, Sequences
from tests.reference import Reference, golden, prompts

PRESETS = ("v2-lite", "v2", "v3", "kimi-k2", "v3fp8", "v3fp8-ragged")
MAX_LOGIT_ERROR = 2e-4
RigOf = Callable[[str], Rig]


@pytest.fixture(scope="session")
def reference_logits(rig: RigOf) -> Callable[[str], list[torch.Tensor]]:
    known: dict[str, list[torch.Tensor]] = {}

    def get(preset: str) -> list[torch.Tensor]:
        if preset not in known:
            reference = Reference(rig(preset).folder)
            known[preset] = [(reference.reset(), reference.forward(ids))[1] for ids in prompts()]
        return known[preset]

    return get


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= MAX_LOGIT_ERROR


@pytest.mark.parametrize("naive", [True, False], ids=["naive", "absorbed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_whole_prompts_in_one_batch(
    preset: str, naive: bool, rig: RigOf, reference_logits: Callable[[str], list[torch.Tensor]]
) -> None:
    ours = Sequences(rig(preset).model(), prompts()).run(chunk=1000, naive=naive)
    assert_close(ours, reference_logits(preset))


@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "kimi-k2", "v3fp8"])
def test_logits_are_those_of_transformers(
    preset: str, rig: RigOf, hf_model: Callable[[str], Any]
) -> None:
    ours = Sequences(rig(preset).model(), prompts()).run(chunk=1000, naive=True)
    with torch.no_grad():
        theirs = [hf_model(preset)(torch.tensor([ids])).logits[0] for ids in prompts()]
    assert_close(ours, theirs)


@pytest.mark.parametrize("naive", [True, False], ids=["naive", "absorbed"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_any_chunking(
    chunk: int, naive: bool, rig: RigOf, reference_logits: Callable[[str], list[torch.Tensor]]
) -> None:
    ours = Sequences(rig("v3").model(), prompts()).run(chunk, naive)
    assert_close(ours, reference_logits("v3"))


def test_mixed_forms_in_one_batch(
    rig: RigOf, reference_logits: Callable[[str], list[torch.Tensor]]
) -> None:
    """Decodes, a short absorbed chunk and two naive ones, one of them on a cached prefix."""
    sequences = Sequences(rig("v2-lite").model(), prompts())
    sequences.step({1: 4, 2: 40, 3: 100}, naive=[2, 3])
    sequences.step({3: 50, 0: 1, 2: 24, 1: 1}, naive=[3])
    assert_close([torch.cat(rows) for rows in sequences.logits], reference_logits("v2-lite"))


def test_the_cache_holds_the_latents(rig: RigOf) -> None:
    model = rig("v3").model()
    sequences = Sequences(model, prompts())
    sequences.run(chunk=1000, naive=True)
    for request, expected in zip(sequences.requests, golden(rig("v3").folder, 1), strict=True):
        blocks = model._caches[1][torch.tensor(request.block_ids)]
        latents = blocks.flatten(0, 1)[: request.num_tokens]
        torch.testing.assert_close(latents, expected.latent, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "v3fp8-ragged"])
def test_deterministic_logits_have_the_same_bits_in_every_batch(preset: str, rig: RigOf) -> None:
    def run(chunk: int, number: slice) -> list[torch.Tensor]:
        model = rig(preset).model(deterministic=True)
        return Sequences(model, prompts()[number]).run(chunk, naive=False)

    whole = run(1000, slice(None))
    for chunk in (1, 7, 16):
        assert all(a.equal(b) for a, b in zip(run(chunk, slice(None)), whole, strict=True))
    assert run(64, slice(2, 3))[0].equal(whole[2])


def test_naive_is_chosen_when_expanding_pays(rig: RigOf) -> None:
    from attention.mla import MlaSizes

    v3 = MlaSizes(num_heads=128, nope=128, rope=64, value=128, latent=512)
    assert not v3.prefers_naive(1, 10_000)
    assert not v3.prefers_naive(170, 1_000_000)
    assert v3.prefers_naive(172, 1_000_000)
    assert v3.prefers_naive(100, 100)
