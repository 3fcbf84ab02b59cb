"""The products of the expert tier, in Triton's interpreter, against twins and float64.

The interpreter rounds to bfloat16 by cutting off, so results in bfloat16 are held to 1%; whatever
is computed from the same operands in float32 to 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from experts.kernels.gpu.grouped_gemm import (
    DeviceWeights,
    block_rows_for,
    down,
    down_torch,
    gate_up_silu,
    gate_up_silu_torch,
)
from experts.kernels.gpu.linear import linear, linear_torch, part_of, silu_mul, silu_mul_torch
from experts.kernels.gpu.permute import SortedPairs, sort_pairs, sort_pairs_torch
from experts.kernels.gpu.quantise import dequantise_blocks, dequantise_rows, quantise_rows_torch

WIDTH, HIDDEN = 144, 208  # f and d: ragged against tiles, depths and blocks of scales
SLOT_OF = torch.tensor([4, 2, -1, 0, 1, 3], dtype=torch.int32)
KINDS = ["f32", "bf16", "fp8", "fp8 decoded"]
FP8 = torch.float8_e4m3fn


def relative(found: Tensor, expected: Tensor) -> float:
    """NaN never passes: a comparison with it is false."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@dataclass(frozen=True)
class Batch:
    x: Tensor
    x_scales: Tensor | None
    weights: DeviceWeights
    expert_ids: Tensor
    row_ids: Tensor
    pair_weights: Tensor
    out_dtype: torch.dtype

    @property
    def live(self) -> Tensor:
        """Pairs that are not dropped."""
        known = (self.expert_ids >= 0) & (self.expert_ids < len(SLOT_OF))
        return known & (SLOT_OF[self.expert_ids.clamp(0, len(SLOT_OF) - 1).long()] >= 0)

    def pairs(self, block_rows: int) -> SortedPairs:
        return sort_pairs_torch(self.expert_ids, len(SLOT_OF), block_rows)


def make_weights(kind: str, generator: torch.Generator) -> DeviceWeights:
    gate_up = torch.randn(5, 2, WIDTH, HIDDEN, generator=generator) / HIDDEN**0.5
    down_weight = torch.randn(5, HIDDEN, WIDTH, generator=generator) / WIDTH**0.5
    if not kind.startswith("fp8"):
        dtype = torch.float32 if kind == "f32" else torch.bfloat16
        return DeviceWeights(gate_up.to(dtype), down_weight.to(dtype))
    scales = torch.rand(5, 2, 2, 2, generator=generator) / 50 + 0.01
    return DeviceWeights(
        (gate_up * 50).to(FP8), (down_weight * 50).to(FP8), scales, scales[:, 1].contiguous()
    )


def make_batch(kind: str, num_rows: int = 5, num_pairs: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(7)
    weights = make_weights(kind, generator)
    x = torch.randn(num_rows, HIDDEN, generator=generator)
    x = x if kind == "f32" else x.bfloat16()
    x, scales = quantise_rows_torch(x) if kind == "fp8" else (x, None)
    return Batch(
        x,
        scales,
        weights,
        torch.randint(-1, len(SLOT_OF) + 1, (num_pairs,), generator=generator).int(),
        torch.randint(0, num_rows, (num_pairs,), generator=generator).int(),
        torch.rand(num_pairs, generator=generator),
        torch.float32,
    )


def exact_gate_up(batch: Batch) -> Tensor:
    """In float64, pair by pair; zero for dropped pairs."""
    rows = batch.x if batch.x_scales is None else dequantise_rows(batch.x, batch.x_scales)
    out = torch.zeros(len(batch.row_ids), WIDTH, dtype=torch.float64)
    for pair in batch.live.nonzero().squeeze(1):
        slot = SLOT_OF[batch.expert_ids[pair]]
        scales = batch.weights.gate_up_scales
        gate, up = (
            dequantise_blocks(
                batch.weights.gate_up[slot, i], None if scales is None else scales[slot, i]
            ).double()
            @ rows[batch.row_ids[pair]].double()
            for i in (0, 1)
        )
        out[pair] = silu(gate) * up
    return out


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: what a kernel does not write shows."""
    empty = torch.empty

    def nan(*shape, **options) -> Tensor:
        out = empty(*shape, **options)
        return out.fill_(float("nan")) if out.dtype in (torch.float32, torch.bfloat16) else out

    monkeypatch.setattr(torch, "empty", nan)


@pytest.mark.parametrize("kind", KINDS)
def test_gate_up_of_every_kind(kind: str, poisoned: None) -> None:
    batch = make_batch(kind)
    pairs = batch.pairs(32 if kind == "f32" else 16)
    arguments = batch.x, batch.x_scales, batch.weights, SLOT_OF, pairs, batch.row_ids
    h = gate_up_silu(*arguments, out_dtype=torch.float32)
    twin = gate_up_silu_torch(*arguments, out_dtype=torch.float32)
    assert 0 < batch.live.sum() < len(batch.live)
    assert relative(h[batch.live], exact_gate_up(batch)[batch.live]) < 1e-5
    assert relative(h[batch.live], twin[batch.live]) < 1e-5
    assert h[~batch.live].isnan().all() and not twin[~batch.live].any()


@pytest.mark.parametrize("kind", KINDS)
def test_down_of_every_kind(kind: str, poisoned: None) -> None:
    batch = make_batch(kind)
    h = torch.randn(len(batch.row_ids), WIDTH, generator=torch.Generator().manual_seed(2))
    h = h if kind == "f32" else h.bfloat16()
    h[~batch.live] = float("nan")  # never read
    h, scales = quantise_rows_torch(h) if kind == "fp8" else (h, None)
    pairs = batch.pairs(32 if kind == "f32" else 16)
    arguments = h, scales, batch.weights, SLOT_OF, pairs, batch.pair_weights
    out, twin = down(*arguments), down_torch(*arguments)
    assert out.dtype == torch.float32 and relative(out, twin) < 1e-5
    assert not out[~batch.live].any()
    rows = h if scales is None else dequantise_rows(h, scales)
    pair = int(batch.live.nonzero()[3])
    slot = SLOT_OF[batch.expert_ids[pair]]
    scales = batch.weights.down_scales
    matrix = dequantise_blocks(batch.weights.down[slot], None if scales is None else scales[slot])
    exact = batch.pair_weights[pair] * (matrix.double() @ rows[pair].double())
    assert relative(out[pair], exact) < 1e-5


@pytest.mark.parametrize("block_rows", [64, 128])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_blocks_of_many_rows_give_the_same(kind: str, block_rows: int, poisoned: None) -> None:
    batch = make_batch(kind)
    batch = replace(batch, expert_ids=torch.full_like(batch.expert_ids, 3))
    arguments = batch.x, batch.x_scales, batch.weights, SLOT_OF, batch.pairs(block_rows)
    h = gate_up_silu(*arguments, batch.row_ids, out_dtype=torch.bfloat16)
    assert relative(h, exact_gate_up(batch)) < 1e-2
    h_and_scales = quantise_rows_torch(h) if kind == "fp8" else (h, None)
    rest = batch.weights, SLOT_OF, batch.pairs(block_rows), batch.pair_weights
    assert relative(down(*h_and_scales, *rest), down_torch(*h_and_scales, *rest)) < 1e-5


def test_more_rows_than_a_block_all_on_one_expert(poisoned: None) -> None:
    batch = make_batch("f32", num_rows=40, num_pairs=70)
    batch = replace(batch, expert_ids=torch.full_like(batch.expert_ids, 1))
    pairs = sort_pairs(batch.expert_ids, len(SLOT_OF), 32)
    assert pairs.block_experts.tolist()[:3] == [1, 1, 1]
    h = gate_up_silu(
        batch.x, None, batch.weights, SLOT_OF, pairs, batch.row_ids, out_dtype=torch.float32
    )
    assert relative(h, exact_gate_up(batch)) < 1e-5


def test_one_row_alone(poisoned: None) -> None:
    batch = make_batch("f32", num_rows=1, num_pairs=1)
    batch = replace(batch, expert_ids=torch.tensor([4], dtype=torch.int32))
    arguments = batch.x, None, batch.weights, SLOT_OF, batch.pairs(32), batch.row_ids
    assert relative(gate_up_silu(*arguments, out_dtype=torch.float32), exact_gate_up(batch)) < 1e-5


def test_a_row_does_not_depend_on_the_batch() -> None:
    batch = make_batch("bf16", num_rows=5, num_pairs=5)
    batch = replace(batch, expert_ids=torch.tensor([0, 1, 1, 1, 3], dtype=torch.int32))

    def computed(count: int) -> Tensor:
        ids = batch.expert_ids[-count:].contiguous()
        block_rows = block_rows_for(count, 6, torch.bfloat16, deterministic=True)
        rest = batch.weights, SLOT_OF, sort_pairs(ids, len(SLOT_OF), block_rows)
        h = gate_up_silu(batch.x, None, *rest, batch.row_ids[-count:], out_dtype=torch.bfloat16)
        return down(h, None, *rest, batch.pair_weights[-count:])

    assert torch.equal(computed(5)[-2:], computed(2))


def test_blocks_are_fixed_when_they_must_be() -> None:
    for dtype in (torch.float32, torch.bfloat16, FP8):
        sizes = {block_rows_for(n, 256, dtype, deterministic=True) for n in (1, 500, 50_000)}
        assert len(sizes) == 1
    assert [block_rows_for(n, 256, FP8) for n in (8, 4096, 9000, 32768)] == [16, 16, 64, 128]


def test_no_pairs() -> None:
    batch, none = make_batch("f32"), torch.empty(0, dtype=torch.int32)
    pairs = sort_pairs(none, len(SLOT_OF), 32)
    rest = batch.weights, SLOT_OF, pairs
    h = gate_up_silu(batch.x, None, *rest, none, out_dtype=torch.float32)
    assert h.shape == (0, WIDTH)
    assert down(h, None, *rest, torch.empty(0)).shape == (0, HIDDEN)


def test_operands_that_do_not_fit_are_refused() -> None:
    batch = make_batch("bf16")
    rest = batch.weights, SLOT_OF, batch.pairs(16), batch.row_ids
    with pytest.raises(ValueError, match=r"not \(5, 208, 144\), row-major"):
        replace(batch.weights, down=batch.weights.down[:, :, :100])
    for x, scales, reason in (
        (batch.x[:, :100], None, "does not fit"),
        (batch.x.float(), None, "x torch.float32, weights torch.bfloat16"),
        (batch.x, torch.ones(5, 2), "scales belong to"),
    ):
        with pytest.raises(ValueError, match=reason):
            gate_up_silu(x, scales, *rest, out_dtype=torch.bfloat16)
    small = sort_pairs_torch(batch.expert_ids[:2], len(SLOT_OF), 16)
    with pytest.raises(ValueError, match="blocks are of other pairs"):
        gate_up_silu(
            batch.x, None, batch.weights, SLOT_OF, small, batch.row_ids, out_dtype=torch.bfloat16
        )


# --- dense ---


def make_linear(width: int, length: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(num_rows, length, generator=generator).bfloat16()
    weight = (torch.randn(width, length, generator=generator) * 50).to(FP8)
    shape = -(-width // 128), -(-length // 128)
    return x, weight, torch.rand(shape, generator=generator) / 50 + 0.01


@pytest.mark.parametrize("fp8_matmul", [True, False])
@pytest.mark.parametrize(
    ("width", "length", "num_rows"), [(192, 144, 3), (70, 1104, 2), (130, 130, 20)]
)
def test_linear_in_fp8(
    width: int, length: int, num_rows: int, fp8_matmul: bool, poisoned: None
) -> None:
    x, weight, scales = make_linear(width, length, num_rows)
    options = {"out_dtype": torch.float32, "fp8_matmul": fp8_matmul}
    found = linear(x, weight, scales, **options)
    rows = dequantise_rows(*quantise_rows_torch(x)) if fp8_matmul else x
    exact = rows.double() @ dequantise_blocks(weight, scales).double().t()
    assert relative(found, exact) < 1e-5
    assert relative(linear_torch(x, weight, scales, **options), exact) < 1e-5
    assert linear(x, weight, scales, fp8_matmul=fp8_matmul).dtype == torch.bfloat16


def test_a_narrow_weight_is_split_by_its_shape_only() -> None:
    # 576 x 7168 and 64 rows: 5 tiles; 14 parts of 512 channels give 70 programs.
    assert part_of(64, 5, 7168, deterministic=False) == part_of(1, 5, 7168, deterministic=False)
    assert part_of(64, 5, 7168, deterministic=False) == 512
    assert part_of(64, 5, 7168, deterministic=True) == 7168
    assert part_of(65, 5, 7168, deterministic=False) == 7168
    assert part_of(64, 300, 7168, deterministic=False) == 7168
    assert part_of(1, 1, 1104, deterministic=False) == 640  # whole blocks of scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_of_plain_weights(dtype: torch.dtype, poisoned: None) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(72, 208, generator=generator).to(dtype)
    x = torch.randn(35, 416, generator=generator).to(dtype)[:, :208]  # rows that lie apart
    exact = x.double() @ weight.double().t()
    options = {"out_dtype": torch.float32, "deterministic": True}
    fixed = linear(x, weight, **options)
    assert relative(fixed, exact) < 1e-5
    assert torch.equal(linear(x[33:], weight, **options), fixed[33:])
    assert relative(linear(x, weight), exact) < (1e-5 if dtype == torch.float32 else 1e-2)
    twin = linear_torch(x, weight, **options)
    assert torch.equal(linear_torch(x[33:], weight, **options), twin[33:])


def test_linear_of_no_rows_and_of_what_does_not_fit() -> None:
    x, weight, scales = make_linear(70, 1104, 2)
    assert linear(x[:0], weight, scales).shape == (0, 70)
    with pytest.raises(ValueError, match="does not fit"):
        linear(x[:, :1000], weight, scales)
    with pytest.raises(ValueError, match="scales belong to"):
        linear(x, weight)
    with pytest.raises(ValueError, match="x torch.bfloat16, weight torch.float32"):
        linear(x, weight.float())


def test_gate_of_a_dense_mlp(poisoned: None) -> None:
    gate_up = torch.randn(3, 2 * 1100, generator=torch.Generator().manual_seed(4))
    expected = silu(gate_up[:, :1100]) * gate_up[:, 1100:]
    assert relative(silu_mul(gate_up), expected) < 1e-6
    assert relative(silu_mul_torch(gate_up), expected) < 1e-6
    assert relative(silu_mul(gate_up.bfloat16()), expected) < 1e-2
    with pytest.raises(ValueError, match="gate_up must be rows"):
        silu_mul(torch.ones(2, 3))
