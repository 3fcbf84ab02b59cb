"""Paged absorbed attention: a token's row is right and its own affair."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.kernels.mla_decode import mla_decode, mla_decode_torch
from experts.kernels import runtime
from tests.experts.weight_builders import TORCH, num_threads

SCALE = 0.11


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Call:
    """The arguments of mla_decode but the scale."""

    q_latent: Tensor
    q_pe: Tensor
    kv_cache: Tensor
    block_tables: Tensor
    seq_ids: Tensor
    context_lens: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        tables = self.block_tables, self.seq_ids, self.context_lens
        return self.q_latent, self.q_pe, self.kv_cache, *tables, SCALE

    def run(self) -> Tensor:
        return mla_decode(*self.arguments())

    def tokens(self, picked: list[int]) -> Call:
        return replace(
            self,
            q_latent=self.q_latent[picked],
            q_pe=self.q_pe[picked],
            seq_ids=self.seq_ids[picked],
            context_lens=self.context_lens[picked],
        )


def random_call(
    context_lens: list[int],
    *,
    num_heads: int = 4,
    latent: int = 32,
    rope: int = 16,
    block_size: int = 16,
    num_seqs: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """Tokens of random sequences, whose blocks lie scattered over the cache."""
    num_tokens, max_blocks = len(context_lens), -(-max(context_lens) // block_size)
    num_blocks = num_seqs * max_blocks + 2
    return Call(
        torch.randn(num_tokens, num_heads, latent),
        torch.randn(num_tokens, num_heads, rope),
        torch.randn(num_blocks, block_size, latent + rope).to(dtype),
        torch.randperm(num_blocks)[: num_seqs * max_blocks].view(num_seqs, max_blocks).int(),
        torch.randint(num_seqs, (num_tokens,), dtype=torch.int32),
        torch.tensor(context_lens, dtype=torch.int32),
    )


def softmax_of_everything(call: Call) -> Tensor:
    """The formula in float64, token by token and position by position."""
    rows = []
    for t, length in enumerate(call.context_lens.tolist()):
        blocks = call.block_tables[call.seq_ids[t]].tolist()
        size = call.kv_cache.shape[1]
        seen = [call.kv_cache[blocks[s // size], s % size].double() for s in range(length)]
        cache, query = torch.stack(seen), torch.cat([call.q_latent[t], call.q_pe[t]], dim=1)
        weights = (query.double() @ cache.t() * SCALE).softmax(dim=1)
        rows.append(weights @ cache[:, : call.q_latent.shape[2]])
    return torch.stack(rows).float()


SHAPES = [
    {"num_heads": 16, "latent": 512, "rope": 64},
    {"num_heads": 5, "latent": 70, "rope": 6},
    {"num_heads": 3, "latent": 20, "rope": 3, "block_size": 5},
    {"num_heads": 1, "latent": 8, "rope": 8, "block_size": 1},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", [None, TORCH])
def test_row_is_the_mean_of_latents_under_the_softmax(
    shape: dict[str, int], dtype: torch.dtype, chosen: runtime.Kernels | None
) -> None:
    call = random_call([1, 2, 17, 127, 128, 129, 700], dtype=dtype, **shape)
    with runtime.override(chosen or runtime.kernels()):
        torch.testing.assert_close(call.run(), softmax_of_everything(call), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_token_has_the_same_bits_in_every_batch(data: st.DataObject) -> None:
    lens = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=12))
    call = random_call(lens, latent=64)
    picked = data.draw(st.permutations(range(len(lens))))[: data.draw(st.integers(1, len(lens)))]
    assert torch.equal(call.tokens(list(picked)).run(), call.run()[list(picked)])


def test_token_has_the_same_bits_with_any_number_of_threads() -> None:
    call = random_call([3, 900, 256, 411])
    results = []
    for threads in (1, 2, 3):
        with num_threads(threads):
            results.append(call.run())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_token_has_the_same_bits_in_another_place_of_the_cache() -> None:
    call = random_call([300, 40])
    order = torch.randperm(call.kv_cache.shape[0])
    moved = replace(
        call, kv_cache=call.kv_cache[order], block_tables=order.argsort().int()[call.block_tables]
    )
    assert torch.equal(moved.run(), call.run())


def test_many_tokens_are_done_in_rounds() -> None:
    """Over 32 MiB of chunk results: 300 tokens x 8 chunks x 16 heads x 514 floats."""
    call = random_call([900] * 300, num_heads=16, latent=512, rope=8, num_seqs=1)
    some = [0, 150, 299]
    assert torch.equal(call.run()[some], call.tokens(some).run())


@pytest.mark.parametrize("chosen", [None, TORCH])
@pytest.mark.parametrize("length", [1, 13, 16, 260])
def test_nothing_behind_the_context_is_seen(length: int, chosen: runtime.Kernels | None) -> None:
    call = random_call([400], num_seqs=1)
    call = replace(call, context_lens=torch.tensor([length], dtype=torch.int32))
    blocks, size = call.block_tables[0].tolist(), 16
    with runtime.override(chosen or runtime.kernels()):
        before = call.run()
        for s in range(length, 400):
            call.kv_cache[blocks[s // size], s % size] = torch.nan
        hidden = call.block_tables.clone()
        hidden[0, -(-length // size) :] = -1
        assert torch.equal(replace(call, block_tables=hidden).run(), before)


def test_queries_may_be_views() -> None:
    call = random_call([30, 300])
    wide = torch.cat([call.q_latent, call.q_pe], dim=2)
    views = replace(call, q_latent=wide[:, :, :32], q_pe=wide[:, :, 32:])
    assert torch.equal(views.run(), call.run())
    apart = call.q_pe.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(replace(call, q_pe=apart).run(), call.run())


def test_no_tokens_give_no_rows() -> None:
    assert random_call([5]).tokens([]).run().shape == (0, 4, 32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seq_ids", torch.tensor([3], dtype=torch.int32)),
        ("seq_ids", torch.tensor([-1], dtype=torch.int32)),
        ("context_lens", torch.tensor([0], dtype=torch.int32)),
        ("context_lens", torch.tensor([33], dtype=torch.int32)),
        ("block_tables", torch.full((3, 2), 99, dtype=torch.int32)),
        ("block_tables", torch.full((3, 2), -1, dtype=torch.int32)),
    ],
)
def test_token_without_cache_is_refused(field: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match="token 0"):
        replace(random_call([32]), **{field: value}).run()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("q_latent", torch.zeros(1, 4, 31)),
        ("q_pe", torch.zeros(1, 5, 16)),
        ("q_pe", torch.zeros(1, 4, 16).double()),
        ("kv_cache", torch.zeros(9, 16, 48).half()),
        ("block_tables", torch.zeros(3, 2).long()),
        ("seq_ids", torch.zeros(1).long()),
        ("context_lens", torch.ones(2, dtype=torch.int32)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(field: str, value: Tensor) -> None:
    with pytest.raises(ValueError):
        replace(random_call([32]), **{field: value}).run()


def test_twin_agrees_with_the_formula() -> None:
    call = random_call([7, 70])
    torch.testing.assert_close(
        mla_decode_torch(*call.arguments()), softmax_of_everything(call), rtol=1e-5, atol=1e-5
    )
