"""Logits of the decoder on a device, played by the CPU, against transformers and the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.device_attention import max_expanded
from attention.device_weights import load_device_weights
from attention.kernels.gpu.cache_layout import CacheLayout, encode_rows, read_rows
from attention.mla import MlaSizes
from attention.weights import load_layer
from experts.kernels.gpu.quantise import dequantise_blocks
from router.local import LocalMoe
from tests.attention.harness import Rig, Sequences
from tests.gpu.device_rig import TWINS, TWINS_BF16, ForcedRoutes, device_model
from tests.reference import Reference, prompts

MAX_LOGIT_ERROR = 2e-4
VIEWS = ("w_uk", "w_uv")  # of kv_b
RigOf = Callable[[str], Rig]


@pytest.fixture(scope="module")
def expected(rig: RigOf) -> Callable[[str], list[Tensor]]:
    """Logits of the four prompts."""
    known: dict[str, list[Tensor]] = {}

    def get(preset: str) -> list[Tensor]:
        if preset not in known:
            reference = Reference(rig(preset).folder)
            known[preset] = [(reference.reset(), reference.forward(ids))[1] for ids in prompts()]
        return known[preset]

    return get


def assert_close(ours: list[Tensor], theirs: list[Tensor], limit: float = MAX_LOGIT_ERROR) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= limit  # false for nan


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    a, b = torch.cat(ours), torch.cat(theirs)
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "kimi-k2", "v3fp8"])
def test_logits_are_those_of_transformers(
    preset: str, rig: RigOf, hf_model: Callable[[str], Any]
) -> None:
    ours = Sequences(device_model(rig(preset)), prompts()).run(chunk=1000, naive=True)
    with torch.no_grad():
        theirs = [hf_model(preset)(torch.tensor([ids])).logits[0] for ids in prompts()]
    assert_close(ours, theirs)


@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "kimi-k2", "v3fp8", "v3fp8-ragged"])
def test_absorbed_prompts(preset: str, rig: RigOf, expected: Callable[[str], list[Tensor]]) -> None:
    ours = Sequences(device_model(rig(preset)), prompts()).run(chunk=1000, naive=False)
    assert_close(ours, expected(preset))


@pytest.mark.parametrize(
    ("chunk", "naive"), [(1, False), (7, False), (7, True), (64, False), (64, True)]
)
def test_any_chunking(
    chunk: int, naive: bool, rig: RigOf, expected: Callable[[str], list[Tensor]]
) -> None:
    ours = Sequences(device_model(rig("v3")), prompts()[:3]).run(chunk, naive)
    assert_close(ours, expected("v3")[:3])


def test_mixed_forms_in_one_batch(rig: RigOf, expected: Callable[[str], list[Tensor]]) -> None:
    """Decodes, a short absorbed chunk and two naive ones, one of them on a cached prefix."""
    sequences = Sequences(device_model(rig("v2-lite")), prompts())
    sequences.step({1: 4, 2: 40, 3: 100}, naive=[2, 3])
    sequences.step({3: 50, 0: 1, 2: 24, 1: 1}, naive=[3])
    assert_close([torch.cat(rows) for rows in sequences.logits], expected("v2-lite"))


def test_a_small_share_of_a_gpu_expands_less() -> None:
    """A tenth of a share is left beside weights and cache: keys and values take a quarter of it."""
    sizes = MlaSizes(128, 128, 64, 128, 512)
    whole, part, played = (
        max_expanded(sizes, replace(TWINS_BF16, total_bytes=share << 30)) for share in (140, 12, 0)
    )
    assert whole == played == 32_768
    assert part * 128 * (128 + 128) * 2 <= (12 << 30) / 40 < (part + 1) * 128 * (128 + 128) * 2


def test_contexts_are_expanded_no_more_than_fit_at_a_time(
    rig: RigOf, expected: Callable[[str], list[Tensor]]
) -> None:
    """Contexts of 64 and 150 tokens where 200 fit: one call each; longer ones are not naive."""
    model, sizes = device_model(rig("v3")), []
    model._mla.max_expanded = 200
    gather = model._mla._ops.gather_latents

    def counted(cache: Tensor, slots: Tensor, *more: Any) -> Tensor:
        sizes.append(len(slots))
        return gather(cache, slots, *more)

    model._mla._ops = replace(model._mla._ops, gather_latents=counted)
    ours = Sequences(model, prompts()).run(chunk=1000, naive=True)
    assert sizes == [1 + 5 + 64, 150] * rig("v3").config.num_hidden_layers
    assert_close(ours, expected("v3"))
    assert model.prefers_naive(200, 200) and not model.prefers_naive(201, 201)


@pytest.mark.parametrize("preset", ["v2-lite", "v3fp8-ragged"])
def test_deterministic_logits_have_the_same_bits_in_every_batch(preset: str, rig: RigOf) -> None:
    """Row by row, in recorded steps with padding, in steps that are not recorded."""

    def run(chunk: int, number: slice) -> list[Tensor]:
        model = device_model(rig(preset), deterministic=True)
        assert not model.prefers_naive(1000, 1000)
        return Sequences(model, short[number]).run(chunk, naive=False)

    short = [ids[:20] for ids in prompts()]
    whole = run(1000, slice(None))
    for chunk in (1, 7):
        assert all(a.equal(b) for a, b in zip(run(chunk, slice(None)), whole, strict=True))
    assert run(3, slice(2, 3))[0].equal(whole[2])


@pytest.mark.parametrize("preset", ["v2-lite", "v3", "v3fp8"])
def test_all_experts_on_the_same_device(
    preset: str, rig: RigOf, expected: Callable[[str], list[Tensor]]
) -> None:
    moe = LocalMoe.open(rig(preset).checkpoint, TWINS)
    sequences = Sequences(device_model(rig(preset), moe=moe), prompts())
    sequences.step({i: len(ids) - 1 for i, ids in enumerate(prompts()) if i}, naive=[2, 3])
    sequences.step({0: 1, 1: 1, 2: 1, 3: 1})
    assert_close([torch.cat(rows) for rows in sequences.logits], expected(preset))


class Rounded(Reference):
    """Keeps latents as an fp8 cache does."""

    def _append(self, layer: int, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        layout = CacheLayout(latent.shape[1], rope_key.shape[1], torch.float8_e4m3fn)
        rows = encode_rows(torch.cat([latent, rope_key], dim=1), layout)
        latent, rope_key = read_rows(rows, layout).split([latent.shape[1], rope_key.shape[1]], 1)
        return super()._append(layer, latent, rope_key)


@pytest.mark.parametrize("naive", [True, False], ids=["naive", "absorbed"])
def test_an_fp8_cache_rounds_latents_and_nothing_else(naive: bool, rig: RigOf) -> None:
    """0.5 % beside a model with rounded latents (a value between two codes may take the other),
    12 % beside an exact one, with the same routes: a code has 3 bits behind the point."""
    v3, ids = rig("v3"), prompts()[3]
    exact, rounded = Reference(v3.folder), Rounded(v3.folder)
    wanted = exact.forward(ids)
    rounded.forced_routes = {layer: found[0][0] for layer, found in exact.routes.items()}
    moe = ForcedRoutes(v3, rounded.forced_routes, torch.float32)
    model = device_model(v3, moe=moe, cache_dtype=torch.float8_e4m3fn)
    ours = Sequences(model, [ids]).run(1000, naive)
    assert relative_error(ours, [rounded.forward(ids)]) < 5e-3
    assert 1e-2 < relative_error(ours, [wanted]) < 0.12


@pytest.mark.parametrize("naive", [True, False], ids=["naive", "absorbed"])
@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "kimi-k2"])
def test_bfloat16_with_the_routes_of_float32(preset: str, naive: bool, rig: RigOf) -> None:
    """6e-2: what transformers' own bfloat16 keeps on the same models."""
    reference, ids = Reference(rig(preset).folder), prompts()[3]
    exact = [reference.forward(ids)]
    routes = {layer: found[0][0] for layer, found in reference.routes.items()}
    model = device_model(rig(preset), TWINS_BF16, ForcedRoutes(rig(preset), routes))
    error = relative_error(Sequences(model, [ids]).run(1000, naive), exact)
    assert 1e-3 < error < 6e-2


@pytest.mark.parametrize(
    ("preset", "num_pieces"), [("v2-lite", 1), ("v3", 1), ("v3fp8", 1), ("v3fp8-ragged", 2)]
)
def test_down_projections_are_one_matrix_where_their_scales_allow(
    preset: str, num_pieces: int, rig: RigOf
) -> None:
    """Of v3fp8-ragged the query's has 160 rows: its last block of scales is not whole."""
    host = load_layer(rig(preset).checkpoint, 1).attention
    layer = load_device_weights(rig(preset).checkpoint, TWINS).layers[1].attention
    assert len(layer.down) == num_pieces
    whole = torch.cat([dequantise_blocks(w.data, w.scales) for w in layer.down])
    upper = host.query.up if host.query.down is None else host.query.down
    assert torch.equal(whole, torch.cat([upper.dequantize(), host.kv_a.dequantize()]))


def test_the_bytes_of_weights_are_those_of_their_tensors(rig: RigOf) -> None:
    weights = load_device_weights(rig("v3fp8").checkpoint, TWINS_BF16)

    def num_bytes(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.nbytes
        if isinstance(value, tuple):
            return sum(map(num_bytes, value))
        names = [field.name for field in fields(value)] if is_dataclass(value) else []
        return sum(num_bytes(getattr(value, name)) for name in names if name not in VIEWS)

    assert weights.num_bytes == num_bytes(weights) > 1e6
