"""Naive attention of whole chunks: causal to the end of each context, over a cached prefix."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.kernels.gpu.mla_prefill import mla_prefill, mla_prefill_torch
from attention.mla import MlaSizes, naive_attention
from experts.checkpoint import Weight

SCALE = 0.13
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **kinds: torch.full(shape, float("nan"), **kinds)
    )


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@dataclass(frozen=True)
class Call:
    q: Tensor
    kv: Tensor
    k_pe: Tensor
    num_new: list[int]
    contexts: list[int]

    def run(self, function: Any = mla_prefill, max_q: int | None = None) -> Tensor:
        longest = max(self.num_new) if max_q is None else max_q
        bounds = starts(self.num_new), starts(self.contexts)
        return function(self.q, self.kv, self.k_pe, *bounds, longest, SCALE)

    def sequence(self, index: int) -> Call:
        q0, k0 = sum(self.num_new[:index]), sum(self.contexts[:index])
        q = self.q[q0 : q0 + self.num_new[index]]
        keys = slice(k0, k0 + self.contexts[index])
        lengths = [self.num_new[index]], [self.contexts[index]]
        return Call(q, self.kv[keys], self.k_pe[keys], *lengths)


def random_call(
    num_new: list[int],
    contexts: list[int],
    *,
    heads: int = 2,
    nope: int = 24,
    rope: int = 10,
    value: int = 20,
    dtype: torch.dtype = F32,
) -> Call:
    """The keys' rope part is the end of a row of latents, as gather_latents gives them."""
    num_q, num_k = sum(num_new), sum(contexts)
    q = torch.randn(num_q, heads, nope + rope).to(dtype)
    kv = torch.randn(num_k, heads, nope + value).to(dtype)
    return Call(q, kv, torch.randn(num_k, rope + 6).to(dtype)[:, 6:], num_new, contexts)


def causal_softmax(call: Call) -> Tensor:
    """float64, query by query."""
    nope = call.q.shape[2] - call.k_pe.shape[1]
    rows = []
    for index, (num_new, context) in enumerate(zip(call.num_new, call.contexts, strict=True)):
        one = call.sequence(index)
        for i in range(num_new):
            seen = context - num_new + i + 1
            keys, k_pe = one.kv[:seen, :, :nope].double(), one.k_pe[:seen].double()
            scores = torch.einsum("hn,shn->hs", one.q[i, :, :nope].double(), keys)
            scores += torch.einsum("hr,sr->hs", one.q[i, :, nope:].double(), k_pe)
            weights = (scores * SCALE).softmax(dim=1)
            rows.append(torch.einsum("hs,shv->hv", weights, one.kv[:seen, :, nope:].double()))
    return torch.stack(rows)


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def test_float32_is_the_formula_for_fresh_prompts_and_cached_prefixes() -> None:
    """A tile has 16 queries and 16 keys."""
    call = random_call([5, 1, 0, 17, 16], [5, 30, 7, 40, 16])
    assert error(call.run(), causal_softmax(call)) < 1e-6
    assert error(call.run(mla_prefill_torch), causal_softmax(call)) < 1e-6


def test_bfloat16_over_more_than_one_tile() -> None:
    """A tile has 128 queries and 64 keys."""
    call = random_call([130, 3], [200, 66], heads=1, dtype=BF16)
    out = call.run()
    assert out.dtype == BF16 and error(out, causal_softmax(call)) < 2e-2


def test_a_chunk_has_the_same_bits_in_any_batch() -> None:
    call = random_call([9, 20, 1], [9, 33, 18])
    together = call.run(max_q=64).split(call.num_new)
    for index, rows in enumerate(together):
        assert call.sequence(index).run().equal(rows)


def test_keys_of_other_sequences_and_of_the_future_are_not_read() -> None:
    call = random_call([4, 0], [6, 9])
    expected = call.run()
    call.kv[6:], call.k_pe[6:] = float("nan"), float("nan")
    assert call.run().equal(expected)
    call.kv[5], call.k_pe[5] = 7.0, 7.0  # seen by the last query only
    assert call.run()[:3].equal(expected[:3]) and not call.run()[3].equal(expected[3])


def test_the_twin_is_the_cpu_function() -> None:
    sizes = MlaSizes(num_heads=2, nope=24, rope=10, value=20, latent=32)
    latents, kv_b = torch.randn(40, 42), torch.randn(2 * 44, 32)
    q = torch.randn(17, 2, 34)
    weights: Any = SimpleNamespace(kv_b=Weight(kv_b))
    expected = naive_attention(q, latents, weights, sizes, SCALE)
    call = Call(q, (latents[:, :32] @ kv_b.T).view(40, 2, 44), latents[:, 32:], [17], [40])
    torch.testing.assert_close(call.run(mla_prefill_torch).flatten(1), expected)


def test_no_queries_is_no_work() -> None:
    assert random_call([0], [3]).run().shape == (0, 2, 20)


def test_arguments_that_do_not_fit_are_refused() -> None:
    call = random_call([3], [4])
    for wrong in (
        Call(call.q[:, :1], call.kv, call.k_pe, [3], [4]),
        Call(call.q.bfloat16(), call.kv, call.k_pe, [3], [4]),
        Call(call.q, call.kv[:3], call.k_pe, [3], [4]),
        Call(call.q, call.kv, call.k_pe, [3], [2, 2]),
    ):
        with pytest.raises(ValueError):
            wrong.run()
