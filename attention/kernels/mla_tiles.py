"""The inner loops of attention over a chunk of the cache; 16-lane vectors, one fixed order.

See experts/kernels/simd.py for why the order is written out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from experts.kernels import simd
from experts.kernels.simd import F32, I64, LANES, ZERO, Builder, Kind, Value, const, offset
from experts.kernels.tiles import TILE_ROWS, direct_tile_of

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

HEAD_TILES: Final = (4, 2, 1) if TILE_ROWS == 4 else (2, 1)

MIX_VECTORS: Final = {8: 3, 4: 4, 2: 4, 1: 4} if TILE_ROWS == 4 else {2: 2, 1: 2}
"""Vectors of the latent in a tile of `mix_tile`, by its heads: 8 x 3 sums ran at 88 GFLOP/s where
4 x 4 gave 66, since a vector that comes from L2 is used 8 times."""

LARGEST_MIX: Final = max(MIX_VECTORS)
_CACHE_KINDS: Final = (Kind.F32, Kind.BF16)

score_tile = direct_tile_of(_CACHE_KINDS, [(TILE_ROWS, heads) for heads in HEAD_TILES] + [(1, 1)])

NEGLIGIBLE: Final = -64.0
"""e^-64 is 1.6e-28 of the largest weight. Left in, weights near e^-87 times a latent are subnormal
numbers, at some 100 cycles an addition: 32 tokens took 2.3 ms a layer instead of 0.5."""


@intrinsic
def softmax_part(_context, _scores, _length, _scale, _stats):
    """scores[i] = e^(scale * scores[i] - m), 0 if negligible; stats[0] = m, their maximum; stats[1]
    = the sum."""

    def codegen(context, b, _signature, args):
        simd.outlined(b, "shoal_softmax_part", args, _emit_softmax)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), codegen


def _emit_softmax(b: Builder, args: Any) -> None:
    scores, length, factor, stats = args
    scale = simd.broadcast(b, factor)
    lowest = simd.fill(F32, float("-inf"))
    highest = cgutils.alloca_once_value(b, lowest)
    sums = cgutils.alloca_once_value(b, ZERO)

    def find_maximum(i: Value, mask: Value | None) -> None:
        address = offset(b, scores, i, 4)
        value = b.fmul(simd.load_f32(b, address, mask), scale)
        simd.store_f32(b, value, address, mask)
        value = value if mask is None else b.select(mask, value, lowest)
        larger = b.fcmp_ordered(">", value, b.load(highest))
        b.store(b.select(larger, value, b.load(highest)), highest)

    simd.for_each_vector(b, length, find_maximum)
    maximum = simd.maximum_lane(b, b.load(highest))
    spread = simd.broadcast(b, maximum)

    def exponentiate(i: Value, mask: Value | None) -> None:
        address = offset(b, scores, i, 4)
        below = b.fsub(simd.load_f32(b, address, mask), spread)
        gone = b.fcmp_ordered("<", below, simd.fill(F32, NEGLIGIBLE))
        value = b.select(gone, ZERO, simd.exp(b, below))
        simd.store_f32(b, value, address, mask)
        value = value if mask is None else b.select(mask, value, ZERO)
        b.store(b.fadd(b.load(sums), value), sums)

    simd.for_each_vector(b, length, exponentiate)
    simd.store(b, maximum, stats)
    total = simd.reduce_lanes(b, [b.load(sums)])
    simd.store(b, b.extract_element(total, ir.Constant(simd.I32, 0)), b.add(stats, const(4)))


@intrinsic
def mix_tile(_context, _kind, _heads, _vectors, _scores, _rows, _at, _length, _width, _results):
    """results[h][j] = sum over s < length, ascending, of scores[h][s] * rows[s][j].

    heads: one of MIX_VECTORS; vectors: what it says, or 1, of which `width` columns exist. scores,
    results: addresses of `heads` pointers to float32; rows: of `length` pointers to cached rows of
    `kind`; columns begin at `at`.
    """

    def codegen(context, b, _signature, args):
        kind, heads, vectors, *rest = args
        code = b.add(b.mul(b.add(b.mul(kind, const(16)), heads), const(8)), vectors)
        cases = {
            int((k * 16 + h) * 8 + v): partial(_emit_mix, k, h, v)
            for k in _CACHE_KINDS
            for h in MIX_VECTORS
            for v in (MIX_VECTORS[h], 1)
        }
        simd.choose(b, code, cases, "shoal_mix", rest)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


def _emit_mix(kind: Kind, heads: int, vectors: int, b: Builder, args: Any) -> None:
    scores, rows, at, length, width, results = args
    mask = simd.first_lanes(b, width) if vectors == 1 else None
    sums = [[cgutils.alloca_once_value(b, ZERO) for _ in range(vectors)] for _ in range(heads)]
    weights = [simd.load(b, b.add(scores, const(8 * h)), I64, 8) for h in range(heads)]
    with cgutils.for_range(b, length) as loop:
        row = simd.load(b, offset(b, rows, loop.index, 8), I64, 8)
        first = offset(b, row, at, kind.element_bytes)
        latents = [
            simd.load_weights(b, kind, _vector_at(b, first, v, kind.element_bytes), ZERO, mask)
            for v in range(vectors)
        ]
        for head, weight in zip(sums, weights, strict=True):
            factor = simd.broadcast(b, simd.load(b, offset(b, weight, loop.index, 4)))
            for cell, latent in zip(head, latents, strict=True):
                b.store(simd.fma(b, latent, factor, b.load(cell)), cell)
    for h, head in enumerate(sums):
        target = offset(b, simd.load(b, b.add(results, const(8 * h)), I64, 8), at, 4)
        for v, cell in enumerate(head):
            simd.store_f32(b, b.load(cell), _vector_at(b, target, v, 4), mask)


def _vector_at(b: Builder, start: Value, vector: int, element_bytes: int) -> Value:
    return b.add(start, const(vector * LANES * element_bytes))


@intrinsic
def merge(_context, _target, _target_factor, _source, _source_factor, _length):
    """target[i] = target[i] * target_factor + source[i] * source_factor"""

    def codegen(context, b, _signature, args):
        simd.outlined(b, "shoal_merge", args, _emit_merge)
        return context.get_dummy_value()

    signature = (types.int64, types.float32, types.int64, types.float32, types.int64)
    return types.void(*signature), codegen


def _emit_merge(b: Builder, args: Any) -> None:
    target, target_factor, source, source_factor, length = args
    kept, added = simd.broadcast(b, target_factor), simd.broadcast(b, source_factor)

    def step(i: Value, mask: Value | None) -> None:
        address = offset(b, target, i, 4)
        before = b.fmul(simd.load_f32(b, address, mask), kept)
        more = simd.load_f32(b, offset(b, source, i, 4), mask)
        simd.store_f32(b, simd.fma(b, more, added, before), address, mask)

    simd.for_each_vector(b, length, step)


@intrinsic
def exp_of(_context, _x):
    """e^x of a float32, as the vectors have it."""

    def codegen(_context, b, _signature, args):
        return b.extract_element(simd.exp(b, simd.broadcast(b, args[0])), ir.Constant(simd.I32, 0))

    return types.float32(types.float32), codegen
