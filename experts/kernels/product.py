"""Products of rows with a weight, in blocks that fit the caches; compiled, no Python objects.

Every result is sum over blocks of BLOCK_LENGTH along the inner dimension, in ascending order, of
the tiles' sums: whatever the number of rows, the path (direct or packed) and the threads.
"""

from __future__ import annotations

from typing import Final

from numba import njit

from experts.kernels.tiles import (
    PACKED_COLS,
    PACKED_ROWS,
    TALL_COLS,
    TALL_ROWS,
    TILE_COLS,
    TILE_ROWS,
    direct_tile,
    pack_weights,
    pack_x,
    packed_tile,
)

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

BLOCK_LENGTH: Final = 512
"""A packed tile of weights (8 x 512 float32) and one of x (3 x 512) fill 22 of the 32 KiB of an L1
cache; with twice the length 86 GFLOP/s a core became of 100."""

WHOLE_X_BYTES: Final = 512 << 10
"""Packed x of this size stays in L2 as a whole; then the rows of weights are read from end to end,
which memory prefers (16 rows: 5.3 instead of 5.9 ms for 5632 x 2048 in bf16)."""

PART_X_BYTES: Final = 256 << 10
"""Else x is worked through in parts of BLOCK_LENGTH columns and this size, each passed over for
every tile of weights (252 rows: 91 GFLOP/s, with 512 KiB 84)."""

SCRATCH_BYTES: Final = 4 * PACKED_ROWS * BLOCK_LENGTH
"""For one packed tile of weights."""

_TILES_PER_PART: Final = max(1, PART_X_BYTES // (4 * BLOCK_LENGTH * PACKED_COLS))
_ELEMENT_SHIFT: Final = (2, 1, 0)  # log2 of the element size, by Kind


@njit(inline="always")
def is_direct(num_rows):
    """Whether the rows of x fit one tile, so that each weight is converted and used once."""
    return num_rows <= TILE_COLS


@njit(inline="always")
def padded(length):
    """Floats of a packed row."""
    return (length + 15) // 16 * 16


@njit(inline="always")
def count_tiles(num_rows):
    return (num_rows + PACKED_COLS - 1) // PACKED_COLS


@njit(inline="always")
def pack_tile(x, num_rows, length, packed, tile):
    """Pack rows of tile number `tile` of the num_rows rows that x points to; sizes are balanced."""
    num_tiles = count_tiles(num_rows)
    start = tile * num_rows // num_tiles
    stop = (tile + 1) * num_rows // num_tiles
    pack_x(stop - start, x + 8 * start, length, packed + 4 * start * padded(length))


@njit(inline="always")
def product(
    kind, weights, scales, length, row_start, row_stop, x, num_rows, packed, results, scratch
):
    """results[m][row_start:row_stop] = weights[row_start:row_stop] x[m] for m < num_rows.

    weights: address of a row-major [out, length] matrix of `kind`; scales: address of its
    [ceil(out/128), ceil(length/128)] float32 or 0; x, results: addresses of num_rows pointers to
    float32 rows; packed: what pack_tile made of x, not read if is_direct(num_rows); scratch: of
    this thread alone, 64-byte aligned.
    """
    row_bytes = length << _ELEMENT_SHIFT[kind]
    tile_rows = PACKED_ROWS
    if is_direct(num_rows):
        tile_rows = TALL_ROWS if num_rows <= TALL_COLS else TILE_ROWS
    tiled_stop = row_stop - (row_stop - row_start) % tile_rows
    if is_direct(num_rows):
        _direct(
            kind, tile_rows, num_rows, weights, row_bytes, scales, length, row_start, tiled_stop,
            x, results,
        )  # fmt: skip
    else:
        _packed(
            kind, weights, row_bytes, scales, length, row_start, tiled_stop, num_rows, packed,
            results, scratch,
        )  # fmt: skip
    for m in range(num_rows):
        if tiled_stop < row_stop:
            _direct(
                kind, 1, 1, weights, row_bytes, scales, length, tiled_stop, row_stop, x + 8 * m,
                results + 8 * m,
            )  # fmt: skip


@njit(inline="always")
def _scale_address(scales, length, row, column):
    return scales + 4 * ((row >> 7) * ((length + 127) >> 7) + (column >> 7))


@njit(inline="always")
def _direct(
    kind, tile_rows, num_rows, weights, row_bytes, scales, length, row_start, row_stop, x, results
):
    for row in range(row_start, row_stop, tile_rows):
        for start in range(0, length, BLOCK_LENGTH):
            direct_tile(
                kind,
                tile_rows,
                num_rows,
                weights + row * row_bytes + (start << _ELEMENT_SHIFT[kind]),
                row_bytes,
                _scale_address(scales, length, row, start),
                x,
                4 * start,
                min(BLOCK_LENGTH, length - start),
                results,
                4 * row,
                start == 0,
            )


@njit(inline="always")
def _packed(
    kind,
    weights,
    row_bytes,
    scales,
    length,
    row_start,
    row_stop,
    num_rows,
    packed,
    results,
    scratch,
):
    num_tiles = count_tiles(num_rows)
    num_parts = (length + BLOCK_LENGTH - 1) // BLOCK_LENGTH
    num_steps = (row_stop - row_start) // PACKED_ROWS
    whole = 4 * num_rows * length <= WHOLE_X_BYTES
    tiles_per_pass = num_tiles if whole else _TILES_PER_PART
    for first_tile in range(0, num_tiles, tiles_per_pass):
        last_tile = min(num_tiles, first_tile + tiles_per_pass)
        for turn in range(num_steps * num_parts):
            if whole:
                step, part = turn // num_parts, turn % num_parts
            else:
                part, step = turn // num_steps, turn % num_steps
            row, start = row_start + step * PACKED_ROWS, part * BLOCK_LENGTH
            width = min(BLOCK_LENGTH, length - start)
            at = row * row_bytes + (start << _ELEMENT_SHIFT[kind])
            ahead = PACKED_ROWS * row_bytes
            if whole and part + 1 < num_parts:
                ahead = BLOCK_LENGTH << _ELEMENT_SHIFT[kind]
            elif whole:
                ahead -= start << _ELEMENT_SHIFT[kind]
            pack_weights(
                kind, weights + at, row_bytes, _scale_address(scales, length, row, start), width,
                ahead, scratch,
            )  # fmt: skip
            m = first_tile * num_rows // num_tiles
            for tile in range(first_tile, last_tile):
                stop = (tile + 1) * num_rows // num_tiles
                packed_tile(
                    stop - m, scratch, packed + 4 * (m * padded(length) + start * (stop - m)),
                    padded(width) // 16, results + 8 * m, 4 * row, 1 if start == 0 else 0,
                )  # fmt: skip
                m = stop
