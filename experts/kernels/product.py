"""Products of rows with a weight, in blocks that fit the caches; compiled, no Python objects.

Every result is sum over blocks of BLOCK_LENGTH along the inner dimension, in ascending order, of
the tiles' sums: whatever the number of rows, the path (direct or packed) and the threads.
"""

from __future__ import annotations

from typing import Final

from numba import njit

from experts.kernels.tiles import (
    TILE_COLS,
    TILE_ROWS,
    direct_tile,
    pack_weights,
    pack_x,
    packed_tile,
)

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

BLOCK_LENGTH: Final = 512
"""A tile of weights (4 x 512 float32) and one of x (6 x 512) fill two thirds of a 32 KiB L1 cache;
1024 ran at 86 GFLOP/s a core where 512 gave 100."""

PACKED_X_BYTES: Final = 256 << 10
"""Of packed x that is passed over again for each tile of weights: 256 KiB of a 1 MiB L2 cache gave
91 GFLOP/s at 252 rows, 512 KiB 84."""

SCRATCH_BYTES: Final = 4 * TILE_ROWS * BLOCK_LENGTH
"""For one packed tile of weights."""

_TILES_PER_PASS: Final = max(1, PACKED_X_BYTES // (4 * BLOCK_LENGTH * TILE_COLS))
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
    return (num_rows + TILE_COLS - 1) // TILE_COLS


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
    tiled_stop = row_stop - (row_stop - row_start) % TILE_ROWS
    if is_direct(num_rows):
        _direct(
            kind, TILE_ROWS, num_rows, weights, row_bytes, scales, length, row_start, tiled_stop,
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
    for start in range(0, length, BLOCK_LENGTH):
        part = min(BLOCK_LENGTH, length - start)
        for first_tile in range(0, num_tiles, _TILES_PER_PASS):
            last_tile = min(num_tiles, first_tile + _TILES_PER_PASS)
            for row in range(row_start, row_stop, TILE_ROWS):
                pack_weights(
                    kind,
                    weights + row * row_bytes + (start << _ELEMENT_SHIFT[kind]),
                    row_bytes,
                    _scale_address(scales, length, row, start),
                    part,
                    scratch,
                )
                m = first_tile * num_rows // num_tiles
                for tile in range(first_tile, last_tile):
                    stop = (tile + 1) * num_rows // num_tiles
                    x_at = packed + 4 * (m * padded(length) + start * (stop - m))
                    packed_tile(
                        stop - m, scratch, x_at, padded(part) // 16, results + 8 * m, 4 * row,
                        start == 0,
                    )  # fmt: skip
                    m = stop
