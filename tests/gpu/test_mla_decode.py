"""Absorbed decode over the paged cache: each row is right, its own affair, and reads no more."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from attention.kernels import mla_decode as cpu
from attention.kernels.gpu import mla_decode as module
from attention.kernels.gpu.cache_layout import CacheLayout, encode_rows, read_rows
from attention.kernels.gpu.mla_decode import mla_decode, mla_decode_torch, pick_num_splits

SCALE = 0.11
F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
NO_BLOCK = 1 << 30


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write stays NaN."""
    torch.manual_seed(0)
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **kinds: torch.full(_shape(shape), float("nan"), **kinds)
    )


def _shape(shape: tuple[object, ...]) -> object:
    return shape[0] if isinstance(shape[0], torch.Size | tuple) else shape


@dataclass(frozen=True)
class Call:
    q_latent: Tensor
    q_pe: Tensor
    kv_cache: Tensor
    block_tables: Tensor
    seq_ids: Tensor
    context_lens: Tensor
    values: Tensor
    """[num_blocks, block_size, c + r] float32: what the cache was made of."""

    def run(self, num_splits: int = 2, native_fp8: bool = True, twin: bool = False) -> Tensor:
        tables = self.block_tables, self.seq_ids, self.context_lens
        function = mla_decode_torch if twin else mla_decode
        return function(
            self.q_latent, self.q_pe, self.kv_cache, *tables, SCALE, num_splits=num_splits,
            native_fp8=native_fp8,
        )  # fmt: skip

    def rows(self, picked: list[int]) -> Call:
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
    heads: int = 3,
    latent: int = 24,
    rope: int = 10,
    block_size: int = 4,
    dtype: torch.dtype = F32,
    cache: torch.dtype | None = None,
) -> Call:
    """Two sequences with blocks scattered over the cache; all that no token may read is NaN or a
    block that does not exist."""
    num_tokens = len(context_lens)
    seq_ids = torch.arange(num_tokens, dtype=torch.int32) % 2
    max_blocks = -(-max(context_lens) // block_size) + 1
    num_blocks = 2 * max_blocks + 1
    tables = torch.randperm(num_blocks)[: 2 * max_blocks].view(2, max_blocks).int()
    layout = CacheLayout(latent, rope, cache or dtype)
    values = torch.full((num_blocks, block_size, latent + rope), float("nan"))
    for seq in range(2):
        longest = max(context_lens[seq::2])
        for position in range(longest):
            values[tables[seq, position // block_size], position % block_size] = torch.randn(
                latent + rope
            )
        tables[seq, -(-longest // block_size) :] = NO_BLOCK
    rows = encode_rows(values.flatten(0, 1), layout).view(num_blocks, block_size, -1)
    q_pe = torch.randn(num_tokens, heads, rope + 6).to(dtype)[:, :, 6:]  # as it lies in q
    context = torch.tensor(context_lens, dtype=torch.int32)
    q_latent = torch.randn(num_tokens, heads, latent).to(dtype)
    return Call(q_latent, q_pe, rows, tables, seq_ids, context, values)


def softmax_of_everything(call: Call, cached: Tensor | None = None) -> Tensor:
    """The formula in float64; cached: the values to attend to, those in the cache by default."""
    num_blocks, block_size, _ = call.kv_cache.shape
    latent = call.q_latent.shape[2]
    if cached is None:
        layout = CacheLayout.of(call.kv_cache, latent, call.q_pe.shape[2])
        cached = read_rows(call.kv_cache.flatten(0, 1), layout).view(num_blocks, block_size, -1)
    out = torch.zeros(call.q_latent.shape, dtype=torch.float64)
    for t, length in enumerate(call.context_lens.tolist()):
        table = call.block_tables[call.seq_ids[t]].tolist()
        at = [(table[s // block_size], s % block_size) for s in range(length)]
        if not at:
            continue
        rows = torch.stack([cached[block, offset] for block, offset in at]).double()
        queries = torch.cat([call.q_latent[t], call.q_pe[t]], dim=1).double()
        out[t] = ((queries @ rows.T) * SCALE).softmax(dim=1) @ rows[:, :latent]
    return out


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("block_size", [4, 16, 64])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_float32_is_the_formula_at_every_block_edge(block_size: int, num_splits: int) -> None:
    edges = [0, 1, block_size - 1, block_size, block_size + 1]
    call = random_call(edges, block_size=block_size)
    assert error(call.run(num_splits), softmax_of_everything(call)) < 1e-6
    assert error(call.run(num_splits, twin=True), softmax_of_everything(call)) < 1e-6


@pytest.mark.parametrize("heads", [3, 70])
@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_with_few_and_many_heads(heads: int, native: bool) -> None:
    """70 heads are two tiles of 64 with a branch around the scores, without fp8 three of 32."""
    call = random_call([67, 0], heads=heads, latent=16, rope=16, block_size=64, dtype=BF16)
    out = call.run(native_fp8=native)
    assert out.dtype == BF16 and error(out, softmax_of_everything(call)) < 2e-2


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fp8_cache_is_dequantised_by_groups_of_128(dtype: torch.dtype, native: bool) -> None:
    """160 values: a whole group, and a quarter of one."""
    call = random_call([19, 5], latent=160, block_size=16, dtype=dtype, cache=FP8)
    out = call.run(native_fp8=native)
    assert error(out, softmax_of_everything(call)) < (1e-6 if dtype == F32 else 2e-2)
    assert error(out, softmax_of_everything(call, call.values)) < 0.05


def test_parts_without_tokens_weigh_nothing() -> None:
    call = random_call([3, 1, 0, 17])  # of 16 tokens a tile: one part has tokens, at most two
    out = call.run(num_splits=7)
    assert error(out, softmax_of_everything(call)) < 1e-6
    assert out[2].eq(0).all()


def test_a_batch_of_padding_is_zeros() -> None:
    assert random_call([1, 1]).rows([]).run().shape == (0, 3, 24)
    padding = replace(random_call([4, 4]), context_lens=torch.zeros(2, dtype=torch.int32))
    assert padding.run(1).eq(0).all() and padding.run(3).eq(0).all()


@pytest.mark.parametrize("num_splits", [1, module.FIXED_SPLITS])
def test_a_row_has_the_same_bits_in_any_batch(num_splits: int) -> None:
    call = random_call([37, 5, 0, 21], dtype=BF16, latent=16)
    together = call.run(num_splits)
    wider = replace(call, block_tables=torch.cat([call.block_tables, call.block_tables], dim=1))
    assert wider.run(num_splits).equal(together)
    for row in range(4):
        assert call.rows([row]).run(num_splits).equal(together[row : row + 1])


def test_rows_that_do_not_fit_the_scratch_go_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_call([5, 9, 0, 2, 1])
    at_once = call.run()
    monkeypatch.setattr(module, "MAX_SCRATCH_BYTES", 2 * 4 * 2 * 3 * 24)  # two rows
    assert call.run().equal(at_once)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_twin_is_the_cpu_function(dtype: torch.dtype) -> None:
    call = random_call([1, 4, 5, 11], cache=dtype)
    tables = call.block_tables.clamp(max=0), call.seq_ids, call.context_lens
    safe = replace(call, block_tables=tables[0], kv_cache=call.kv_cache.nan_to_num(0.5))
    arguments = safe.q_latent, safe.q_pe, safe.kv_cache, *tables, SCALE
    torch.testing.assert_close(safe.run(twin=True), cpu.mla_decode_torch(*arguments))
    torch.testing.assert_close(safe.run(twin=True), cpu.mla_decode(*arguments))


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "max_context", "expected"),
    [
        (1, 16, 8192, 28),  # a program a token: within 85% of the 32 that are allowed
        (1, 16, 300, 1),  # parts of less than 256 tokens do not pay
        (66, 128, 8192, 1),  # 132 programs are one whole wave
        (64, 128, 8192, 1),  # 97% of one
        (70, 128, 8192, 4),  # 140: two waves at 53%; in 4 parts 560, five at 85%
        (200, 16, 8192, 5),  # 264 at a time: one wave at 76%; in 5 parts 1000, four at 95%
    ],
)
def test_splits_fill_the_multiprocessors(
    num_tokens: int, num_heads: int, max_context: int, expected: int
) -> None:
    assert pick_num_splits(num_tokens, num_heads, 132, max_context) == expected
    fixed = pick_num_splits(num_tokens, num_heads, 132, max_context, deterministic=True)
    assert fixed == module.FIXED_SPLITS


def test_arguments_that_do_not_fit_are_refused() -> None:
    call = random_call([3, 2])
    for wrong in (
        replace(call, q_pe=call.q_pe[:, :, :8]),
        replace(call, q_latent=call.q_latent.bfloat16(), q_pe=call.q_pe.bfloat16()),
        replace(call, context_lens=call.context_lens.long()),
        replace(call, block_tables=call.block_tables.t()),
        replace(call, q_latent=call.q_latent.transpose(1, 2).contiguous().transpose(1, 2)),
    ):
        with pytest.raises(ValueError):
            wrong.run()
