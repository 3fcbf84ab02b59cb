"""The write into the latent cache, its layouts, and the gather out of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attention import layers
from attention.kernels.gpu.cache_layout import CacheLayout, encode_rows, read_rows
from attention.kernels.gpu.latent_cache import (
    gather_latents,
    gather_latents_torch,
    rotate_query_and_cache_latent,
    rotate_query_and_cache_latent_torch,
)

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
CPU = torch.device("cpu")
NUM_BLOCKS, BLOCK_SIZE = 3, 4
POISON = 0x7F


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True, slots=True)
class Step:
    """Five tokens, one of them padding."""

    q: Tensor
    kv_a: Tensor
    norm: Tensor
    rope: Tensor
    positions: Tensor
    slots: Tensor
    cache: Tensor
    layout: CacheLayout

    @classmethod
    def random(
        cls, cache: torch.dtype, dtype: torch.dtype = F32, *, latent: int = 36, rope: int = 10
    ) -> Step:
        layout = CacheLayout(latent, rope, cache)
        poisoned = layout.new_cache(1, NUM_BLOCKS, BLOCK_SIZE, CPU)[0]
        poisoned.view(torch.uint8).fill_(POISON)
        return cls(
            torch.randn(5, 3, 7 + rope).to(dtype),
            torch.randn(5, latent + rope + 2).to(dtype)[:, 2:],  # as it lies behind q's columns
            torch.rand(latent) + 0.5,
            torch.randn(20, rope),
            torch.tensor([19, 0, 3, 3, 7], dtype=torch.int32),
            torch.tensor([11, 0, -1, 5, 2]),
            poisoned,
            layout,
        )

    def run(self, twin: bool = False) -> Tensor:
        """Rows of the cache after the step; q is turned in place."""
        function = rotate_query_and_cache_latent
        if twin:
            function = rotate_query_and_cache_latent_torch
        function(self.q, self.kv_a, self.norm, self.rope, self.positions, self.slots, self.cache)
        return self.cache.view(-1, self.layout.width)


def written(step: Step, twin: bool = False) -> Tensor:
    """What the four tokens left in the cache, dequantised."""
    return read_rows(step.run(twin)[step.slots[step.slots >= 0]], step.layout)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cache", [F32, BF16, FP8])
def test_kernel_and_twin_write_the_same(cache: torch.dtype, dtype: torch.dtype) -> None:
    one, other = Step.random(cache, dtype), None
    torch.manual_seed(0)
    other = Step.random(cache, dtype)
    tolerance = {F32: 1e-6, BF16: 1e-2, FP8: 0.1}[cache]
    torch.testing.assert_close(
        written(one), written(other, twin=True), atol=tolerance, rtol=tolerance
    )
    tolerance = 1e-6 if dtype == F32 else 1e-2
    torch.testing.assert_close(one.q, other.q, atol=tolerance, rtol=tolerance)


def test_the_twin_is_the_cpu_function() -> None:
    step = Step.random(F32)
    q, flat = step.q.clone(), torch.zeros(NUM_BLOCKS * BLOCK_SIZE + 1, 46)
    arguments = step.kv_a.contiguous(), step.norm, step.rope, step.positions
    slots = step.slots.where(step.slots >= 0, NUM_BLOCKS * BLOCK_SIZE)  # padding: past the cache
    layers.rotate_query_and_cache_latent_torch(q, *arguments, slots, flat)
    rows = written(step, twin=True)
    torch.testing.assert_close(rows, flat[step.slots[step.slots >= 0]], rtol=0, atol=1e-6)
    assert step.q.equal(q)


@pytest.mark.parametrize("cache", [F32, FP8])
def test_other_slots_and_the_front_of_a_query_stay_as_they_were(cache: torch.dtype) -> None:
    step = Step.random(cache)
    front = step.q[:, :, :7].clone()
    rows = step.run().view(torch.uint8)
    untouched = [slot for slot in range(12) if slot not in (11, 0, 5, 2)]
    assert rows[untouched].eq(POISON).all()
    assert step.q[:, :, :7].equal(front)


def test_fp8_codes_are_those_of_the_formula() -> None:
    """The same step into a float32 cache says what was to be quantised: 160 values, two groups."""
    quantised = Step.random(FP8, latent=160)
    torch.manual_seed(0)
    plain = Step.random(F32, latent=160)
    values, slots = plain.run()[plain.slots], plain.slots >= 0
    layout = quantised.layout
    quantised_bytes = 160 + 4 * 2  # codes and scales
    rows = quantised.run()[quantised.slots][slots]
    assert rows[:, :quantised_bytes].equal(encode_rows(values[slots], layout)[:, :quantised_bytes])
    back = read_rows(rows, layout)
    for group in (slice(0, 128), slice(128, 160)):
        exact = values[slots][:, group]
        bound = exact.abs().amax(dim=1, keepdim=True) / 448 * 16  # half of the widest step, 32
        assert ((back[:, group] - exact).abs() <= bound * 1.001).all()
    # Never quantised; within a step of bfloat16, as the interpreter cuts its bits off.
    torch.testing.assert_close(back[:, 160:], values[slots][:, 160:], rtol=2**-7, atol=0)


def test_fp8_rows_by_hand() -> None:
    layout = CacheLayout(4, 2, FP8)
    row = encode_rows(torch.tensor([[0.1, -1.0, 3.3, 250.0, 1.0, -2.0]]), layout)
    assert row[0, :4].tolist() == [35, 190, 76, 126]
    assert row.view(torch.float32)[0, 1].item() == pytest.approx(250 / 448)
    expected = [0.0959124, -0.9765625, 3.3482144, 250.0, 1.0, -2.0]
    assert read_rows(row, layout)[0].tolist() == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, in the interpreter
def test_a_group_of_zeros_and_one_with_a_nan() -> None:
    """NaN may not turn into a number on its way through the cache."""
    step = Step.random(FP8)
    step.kv_a[0, :36] = 0.0
    step.kv_a[1, 5] = float("nan")
    rows = written(step)
    assert rows[0, :36].eq(0).all()
    assert rows[1, :36].isnan().all() and not rows[2].isnan().any()


@pytest.mark.parametrize("cache", [F32, BF16, FP8])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gather_reads_what_was_written(cache: torch.dtype, dtype: torch.dtype) -> None:
    layout = CacheLayout(160, 10, cache)
    rows = encode_rows(torch.randn(12, 170), layout).view(NUM_BLOCKS, BLOCK_SIZE, -1)
    slots = torch.tensor([7, -1, 0, 11, 7])
    out = gather_latents(rows, slots, layout, dtype)
    expected = read_rows(rows.flatten(0, 1), layout)[slots]
    expected[1] = 0.0
    torch.testing.assert_close(out.float(), expected, rtol=0 if dtype == F32 else 1e-2, atol=0)
    twin = gather_latents_torch(rows, slots, layout, dtype)
    assert twin.equal(expected.to(dtype)) and out.dtype == dtype
    assert gather_latents(rows, slots[:0], layout, dtype).shape == (0, 170)


@pytest.mark.parametrize(
    ("latent", "rope", "dtype", "row_bytes"),
    [
        (512, 64, FP8, 656),  # 512 codes, 4 scales, 64 keys
        (512, 64, BF16, 1152),
        (512, 64, F32, 2304),
        (36, 10, FP8, 64),  # 36 + 4 + 20 = 60, padded
    ],
)
def test_bytes_of_a_token(latent: int, rope: int, dtype: torch.dtype, row_bytes: int) -> None:
    layout = CacheLayout(latent, rope, dtype)
    cache = layout.new_cache(2, 3, 4, CPU)
    assert layout.row_bytes == row_bytes
    assert cache.nbytes == 2 * 3 * 4 * row_bytes and cache.shape[:3] == (2, 3, 4)


def test_layouts_and_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        CacheLayout(32, 16, torch.float16)
    with pytest.raises(ValueError, match="latent 30"):
        CacheLayout(30, 16, FP8)
    step = Step.random(F32)
    with pytest.raises(ValueError, match="kv_cache must be"):
        CacheLayout.of(step.cache, 32, 10)
    for wrong in (
        {"slots": step.slots.int()},
        {"positions": step.positions[:3]},
        {"norm": step.norm.bfloat16()},
        {"kv_a": step.kv_a[:, 1:]},
        {"q": step.q.transpose(1, 2)},
    ):
        with pytest.raises(ValueError):
            Step(**{**{name: getattr(step, name) for name in step.__slots__}, **wrong}).run()
