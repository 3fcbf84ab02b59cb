"""The inner loops: a few rows of a weight times a few rows of x, all of it in registers.

A tile keeps one vector of 16 partial sums for each of its rows x columns results, adds up products
along the inner dimension in ascending order, 16 lanes at a time, and at the end the lanes. Tiles of
all sizes do exactly the same operations for a result, so which tile computes it does not show.

Two forms: *direct* reads weights and rows of x where they lie and converts in registers (few rows
of x: each weight is used once or twice, memory is the limit); *packed* reads both from buffers that
hold them as float32 in the order of use (many rows: arithmetic is the limit. Rows that are
multiples of 4 KiB apart fall into the same cache sets; packing took bf16 x 64 rows from 76 to 90
GFLOP/s a core where the arithmetic peak is 125).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from experts.kernels import simd
from experts.kernels.simd import I64, LANES, ZERO, Builder, Kind, Value, const, offset

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"


def _has_32_wide_registers() -> bool:
    if config.CPU_NAME and config.CPU_NAME != "host":
        return "+avx512f" in (config.CPU_FEATURES or "")
    return bool(llvm.get_host_cpu_features().get("avx512f", False))


# 24 sums and 4 + 1 operands fill the 32 registers of AVX-512; elsewhere a vector takes two or
# four registers. The sizes change the speed and no bit of the results.
TILE_ROWS, TILE_COLS = (4, 6) if _has_32_wide_registers() else (2, 2)

# One or two rows of x leave sums unused: twice as many rows of weights share the reduction of the
# lanes and the loads of x (weights in cache, 64 x 512: 39 instead of 25 GFLOP/s).
TALL_ROWS, TALL_COLS = 2 * TILE_ROWS, TILE_COLS // 3 or 1

# Packed x streams from L2 and is read once for `rows` rows of weights: 8 x 3 took 252 rows from 92
# to 97 GFLOP/s a core.
PACKED_ROWS, PACKED_COLS = (8, 3) if TILE_ROWS == 4 else (2, 2)


def _accumulate(b: Builder, sums: list[list[Value]], weights: list[Value], x: list[Value]) -> None:
    for row, weight in zip(sums, weights, strict=True):
        for cell, column in zip(row, x, strict=True):
            b.store(simd.fma(b, weight, column, b.load(cell)), cell)


def _new_sums(b: Builder, rows: int, cols: int) -> list[list[Value]]:
    return [[cgutils.alloca_once_value(b, ZERO) for _ in range(cols)] for _ in range(rows)]


def _add_to_results(
    b: Builder, sums: list[list[Value]], results: Value, at: Value, first: Value
) -> None:
    """results: address of one pointer a column; `rows` neighbouring float32 of each are updated."""
    rows, cols = len(sums), len(sums[0])
    piece = ir.VectorType(simd.F32, rows)
    is_first = b.icmp_signed("!=", first, const(0))
    per_vector = LANES // rows
    for start in range(0, cols, per_vector):
        columns = range(start, min(cols, start + per_vector))
        cells = [b.load(sums[r][c]) for c in columns for r in range(rows)]
        total = simd.reduce_lanes(b, cells)
        for i, c in enumerate(columns):
            lanes = simd.lanes_of(simd.I32, range(i * rows, (i + 1) * rows))
            part = b.shuffle_vector(total, simd.UNDEFINED, lanes)
            target = b.add(_pointer(b, results, c), at)
            before = b.select(is_first, ir.Constant(piece, None), simd.load(b, target, piece))
            simd.store(b, b.fadd(part, before), target)


def _pointer(b: Builder, table: Value, index: int) -> Value:
    return simd.load(b, b.add(table, const(8 * index)), I64, 8)


def _emit_direct(kind: Kind, rows: int, cols: int, b: Builder, args: Any) -> None:
    weights, row_bytes, scales, x, x_at, length, results, results_at, first = args
    sums = _new_sums(b, rows, cols)
    starts = [b.add(_pointer(b, x, c), x_at) for c in range(cols)]
    next_tile = b.mul(row_bytes, const(rows))

    def step(i: Value, mask: Value | None) -> None:
        scale = simd.load_scale(b, kind, scales, i)
        columns = [simd.load_f32(b, offset(b, start, i, 4), mask) for start in starts]
        address = offset(b, weights, i, kind.element_bytes)
        loaded = []
        for _ in range(rows):
            if mask is None:  # one row is 2-8 KiB: the hardware's prefetch ends with its page
                simd.prefetch(b, b.add(address, next_tile))
            loaded.append(simd.load_weights(b, kind, address, scale, mask))
            address = b.add(address, row_bytes)
        _accumulate(b, sums, loaded, columns)

    simd.for_each_vector(b, length, step)
    _add_to_results(b, sums, results, results_at, first)


def _emit_packed(rows: int, cols: int, b: Builder, args: Any) -> None:
    weights, x, num_vectors, results, results_at, first = args
    sums = _new_sums(b, rows, cols)
    with cgutils.for_range(b, num_vectors) as loop:
        row = offset(b, weights, loop.index, 4 * LANES * rows)
        column = offset(b, x, loop.index, 4 * LANES * cols)
        loaded = [simd.load(b, b.add(row, const(64 * r)), simd.VECTOR, 64) for r in range(rows)]
        columns = [simd.load(b, b.add(column, const(64 * c)), simd.VECTOR, 64) for c in range(cols)]
        _accumulate(b, sums, loaded, columns)
    _add_to_results(b, sums, results, results_at, first)


def _emit_pack_weights(kind: Kind, b: Builder, args: Any) -> None:
    weights, row_bytes, scales, length, ahead, packed = args

    def step(i: Value, mask: Value | None) -> None:
        scale = simd.load_scale(b, kind, scales, i)
        address = offset(b, weights, i, kind.element_bytes)
        target = offset(b, packed, i, 4 * PACKED_ROWS)
        for r in range(PACKED_ROWS):
            simd.prefetch(b, b.add(address, ahead))
            vector = simd.load_weights(b, kind, address, scale, mask)
            simd.store(b, vector, b.add(target, const(64 * r)), 64)
            address = b.add(address, row_bytes)

    simd.for_each_vector(b, length, step)


def _emit_pack_x(cols: int, b: Builder, args: Any) -> None:
    x, length, packed = args
    starts = [_pointer(b, x, c) for c in range(cols)]

    def step(i: Value, mask: Value | None) -> None:
        target = offset(b, packed, i, 4 * cols)
        for c, start in enumerate(starts):
            vector = simd.load_f32(b, offset(b, start, i, 4), mask)
            simd.store(b, vector, b.add(target, const(64 * c)), 64)

    simd.for_each_vector(b, length, step)


def direct_tile_of(kinds: Sequence[Kind], shapes: Sequence[tuple[int, int]]) -> Any:
    """An intrinsic for these kinds of weights and (rows, cols) of tiles; each costs compile time.

    direct_tile(kind, rows, cols, weights, row_bytes, scales, x, x_at, length, results, results_at,
    first): results[c][r] (+)= sum over i < length of weights[r, i] * x[c, i].
    rows x cols: one of `shapes`. weights: address, rows row_bytes apart; scales: address of the
    scale of the first 128 columns (fp8); x and results: addresses of `cols` pointers, to which x_at
    and results_at bytes are added; first: 1 to set, 0 to add.
    """
    cases: dict[int, simd.Emitter] = {
        int((kind * 16 + rows) * 8 + cols): partial(_emit_direct, kind, rows, cols)
        for kind in kinds
        for rows, cols in shapes
    }

    @intrinsic
    def direct_tile(
        _context, _kind, _rows, _cols, _weights, _row_bytes, _scales, _x, _x_at, _length, _results,
        _results_at, _first,
    ):  # fmt: skip
        def codegen(context, b, _signature, args):
            kind, rows, cols, *rest = args
            code = b.add(b.mul(b.add(b.mul(kind, const(16)), rows), const(8)), cols)
            simd.choose(b, code, cases, "shoal_direct", rest)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), codegen

    return direct_tile


def direct_rows(num_cols: int) -> int:
    """Rows of the direct tile for this many columns."""
    return TALL_ROWS if num_cols <= TALL_COLS else TILE_ROWS


direct_tile = direct_tile_of(
    tuple(Kind), [(direct_rows(cols), cols) for cols in range(1, TILE_COLS + 1)] + [(1, 1)]
)


@intrinsic
def packed_tile(_context, _cols, _weights, _x, _num_vectors, _results, _results_at, _first):
    """The same, PACKED_ROWS x cols, from buffers [num_vectors, rows or cols, 16] float32."""

    def codegen(context, b, _signature, args):
        cases: dict[int, simd.Emitter] = {
            c: partial(_emit_packed, PACKED_ROWS, c) for c in range(1, PACKED_COLS + 1)
        }
        simd.choose(b, args[0], cases, "shoal_packed", args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def pack_weights(_context, _kind, _weights, _row_bytes, _scales, _length, _ahead, _packed):
    """PACKED_ROWS rows -> [ceil(length / 16), rows, 16] float32, aligned to 64, zero-padded.

    What lies `ahead` bytes further on is fetched, to arrive while this tile is multiplied.
    """

    def codegen(context, b, _signature, args):
        cases: dict[int, simd.Emitter] = {int(k): partial(_emit_pack_weights, k) for k in Kind}
        simd.choose(b, args[0], cases, "shoal_pack_weights", args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def pack_x(_context, _cols, _x, _length, _packed):
    """`cols` rows (x: address of their pointers) -> [ceil(length / 16), cols, 16] float32."""

    def codegen(context, b, _signature, args):
        cases: dict[int, simd.Emitter] = {
            c: partial(_emit_pack_x, c) for c in range(1, PACKED_COLS + 1)
        }
        simd.choose(b, args[0], cases, "shoal_pack_x", args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
