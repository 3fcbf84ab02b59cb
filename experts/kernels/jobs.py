"""The parallel part of all products: threads take blocks of work from a counter until none is left.

A *job* is one product of several groups at once (a linear layer is one group): a group is one
weight and the rows of x that meet it. Rows of all groups stand in one list of pointers, group after
group. Which thread computes which block does not change a bit of the result.

A job is an array of int64 fields, named below. (Addresses and numbers only, no NumPy arrays inside
compiled code: that halves the time to compile it.)
"""

from __future__ import annotations

from typing import Final

from numba import cfunc, njit, types

from experts.kernels import elementwise
from experts.kernels.memory import read_f32, read_i64, take, write_i64
from experts.kernels.pool import BODIES, NUM_THREADS, allocate, release, run_with_helpers
from experts.kernels.product import (
    SCRATCH_BYTES,
    count_tiles,
    is_direct,
    pack_tile,
    padded,
    product,
)
from experts.kernels.tiles import TALL_ROWS

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

NEXT_TASK: Final = 0  # the counter; the job's address is the counter's
POOL: Final = 1
KIND: Final = 2
NUM_GROUPS: Final = 3
GROUP_STARTS: Final = 4  # [num_groups + 1]: rows of group g are group_starts[g]..[g + 1] - 1
WEIGHTS: Final = 5  # [num_groups] addresses of [num_outputs, length] matrices
SCALES: Final = 6  # [num_groups] addresses, 0 without
NUM_OUTPUTS: Final = 7
LENGTH: Final = 8
X: Final = 9  # [P] pointers to rows
RESULTS: Final = 10  # [P] pointers to rows
UP_WEIGHTS: Final = 11  # as weights, or 0; with it the result is silu(weights x) * (up_weights x)
UP_SCALES: Final = 12
UP_RESULTS: Final = 13  # [P] pointers to rows, space for up_weights x
ROW_FACTORS: Final = 14  # [P] float32 that multiply the result's rows, or 0
PACKED: Final = 15  # space for the packed rows of the groups that are not direct
BLOCK_OUTPUTS: Final = 16
JOB_FIELDS: Final = 24


@njit(inline="always")
def _start_of(job, group):
    return read_i64(read_i64(job, GROUP_STARTS), group)


@njit(inline="always")
def _packed_of(job, start):
    return read_i64(job, PACKED) + 4 * start * padded(read_i64(job, LENGTH))


@cfunc(types.void(types.int64), cache=True)
def pack_rows(job):
    """Pack the rows of the groups that have more than one tile; a task is a group's tile."""
    task = take(job, 1)
    tiles_before = 0
    for group in range(read_i64(job, NUM_GROUPS)):
        start = _start_of(job, group)
        num_rows = _start_of(job, group + 1) - start
        num_tiles = 0 if is_direct(num_rows) else count_tiles(num_rows)
        while task < tiles_before + num_tiles:
            pack_tile(
                read_i64(job, X) + 8 * start, num_rows, read_i64(job, LENGTH),
                _packed_of(job, start), task - tiles_before,
            )  # fmt: skip
            task = take(job, 1)
        tiles_before += num_tiles


@cfunc(types.void(types.int64), cache=True)
def multiply(job):
    """Blocks of outputs of the groups; then the gate and the factors of the rows."""
    num_outputs, block_outputs = read_i64(job, NUM_OUTPUTS), read_i64(job, BLOCK_OUTPUTS)
    num_blocks = (num_outputs + block_outputs - 1) // block_outputs
    num_tasks = num_blocks * read_i64(job, NUM_GROUPS)
    task = take(job, 1)
    if task >= num_tasks:
        return
    scratch = allocate(read_i64(job, POOL), SCRATCH_BYTES)
    while task < num_tasks:
        group = task // num_blocks
        first = (task - group * num_blocks) * block_outputs
        last = min(first + block_outputs, num_outputs)
        start = _start_of(job, group)
        num_rows = _start_of(job, group + 1) - start
        gated = read_i64(job, UP_WEIGHTS) != 0
        for side in range(2 if gated else 1):  # UP_* follow in the order of WEIGHTS, ..., RESULTS
            weights = read_i64(job, UP_WEIGHTS if side == 1 else WEIGHTS)
            scales = read_i64(job, UP_SCALES if side == 1 else SCALES)
            results = read_i64(job, UP_RESULTS if side == 1 else RESULTS)
            product(
                read_i64(job, KIND), read_i64(weights, group), read_i64(scales, group),
                read_i64(job, LENGTH), first, last, read_i64(job, X) + 8 * start, num_rows,
                _packed_of(job, start), results + 8 * start, scratch,
            )  # fmt: skip
        for row in range(start, start + num_rows):
            result = read_i64(read_i64(job, RESULTS), row) + 4 * first
            if gated:
                up = read_i64(read_i64(job, UP_RESULTS), row) + 4 * first
                elementwise.gate(result, up, last - first)
            if read_i64(job, ROW_FACTORS) != 0:
                factor = read_f32(read_i64(job, ROW_FACTORS), row)
                elementwise.scale(result, last - first, factor)
        task = take(job, 1)
    release(read_i64(job, POOL), scratch)


_BLOCKS_PER_THREAD: Final = 8
_MIN_PARALLEL_PRODUCTS: Final = 1 << 16
"""Multiply-adds below which a job is done before a helper has come."""


@njit
def run(job):
    """Pack if need be, then multiply, with the helpers of the pool."""
    pool, num_groups = read_i64(job, POOL), read_i64(job, NUM_GROUPS)
    num_rows, num_direct = _start_of(job, num_groups), 0
    for group in range(num_groups):
        rows = _start_of(job, group + 1) - _start_of(job, group)
        if is_direct(rows):
            num_direct += rows
    num_threads, num_outputs = read_i64(pool, NUM_THREADS), read_i64(job, NUM_OUTPUTS)
    if num_rows * num_outputs * read_i64(job, LENGTH) < _MIN_PARALLEL_PRODUCTS:
        num_threads = 1
    block = num_groups * num_outputs // (_BLOCKS_PER_THREAD * num_threads)
    block = max(16, min(256, (block + TALL_ROWS - 1) // TALL_ROWS * TALL_ROWS))
    write_i64(job, BLOCK_OUTPUTS, block)
    if num_direct < num_rows:
        write_i64(job, NEXT_TASK, 0)
        run_with_helpers(pool, num_threads, read_i64(pool, BODIES), job)
    write_i64(job, NEXT_TASK, 0)
    run_with_helpers(pool, num_threads, read_i64(pool, BODIES + 1), job)
