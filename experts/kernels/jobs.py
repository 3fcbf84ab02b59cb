"""The parallel part of all products: threads take blocks of work from a counter until none is left.

A *job* is one product of several groups at once (a linear layer is one group): a group is one
weight and the rows of x that meet it. Rows of all groups stand in one list of pointers, group after
group. Which thread computes which block does not change a bit of the result.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types

from experts.kernels import elementwise
from experts.kernels.memory import address_of, keep, read_f32, read_i64, run_parallel, take
from experts.kernels.product import (
    SCRATCH_FLOATS,
    count_tiles,
    is_direct,
    pack_tile,
    padded,
    product,
)
from experts.kernels.tiles import TILE_ROWS

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

_FIELDS: Final = (
    "next_task",  # the counter; first, so that the job's address is the counter's
    "num_groups",
    "group_starts",  # [num_groups + 1] int64: rows of group g are group_starts[g]..[g + 1] - 1
    "kind",
    "weights",  # [num_groups] addresses of [num_outputs, length] matrices
    "scales",  # [num_groups] addresses, 0 without
    "num_outputs",
    "length",
    "x",  # [P] pointers to rows
    "results",  # [P] pointers to rows
    "up_weights",  # as weights, or 0: then the result is silu(weights x) * (up_weights x)
    "up_scales",
    "up_results",  # [P] pointers to rows, space for up_weights x
    "row_factors",  # [P] float32 that multiply the result's rows, or 0
    "packed",  # space for the packed rows of the groups that are not direct
    "block_outputs",
)
Job: Final = np.dtype([(name, np.int64) for name in _FIELDS])
_body = types.void(types.CPointer(from_dtype(Job)))


@cfunc(_body, cache=True)
def pack_rows(pointer):
    """Pack the rows of the groups that have more than one tile; a task is a group's tile."""
    jobs = carray(pointer, 1)
    job = jobs[0]
    task = take(address_of(jobs), 1)
    tiles_before = 0
    for group in range(job.num_groups):
        start = read_i64(job.group_starts, group)
        num_rows = read_i64(job.group_starts, group + 1) - start
        num_tiles = 0 if is_direct(num_rows) else count_tiles(num_rows)
        while task < tiles_before + num_tiles:
            packed = job.packed + 4 * start * padded(job.length)
            pack_tile(job.x + 8 * start, num_rows, job.length, packed, task - tiles_before)
            task = take(address_of(jobs), 1)
        tiles_before += num_tiles


@njit
def _multiply_block(job, group, first, scratch):
    last = min(first + job.block_outputs, job.num_outputs)
    start = read_i64(job.group_starts, group)
    num_rows = read_i64(job.group_starts, group + 1) - start
    packed = job.packed + 4 * start * padded(job.length)
    num_factors = 2 if job.up_weights != 0 else 1
    for factor in range(num_factors):
        weights, scales, results = job.weights, job.scales, job.results
        if factor == 1:
            weights, scales, results = job.up_weights, job.up_scales, job.up_results
        product(
            job.kind, read_i64(weights, group), read_i64(scales, group), job.length, first, last,
            job.x + 8 * start, num_rows, packed, results + 8 * start, scratch,
        )  # fmt: skip
    for row in range(start, start + num_rows):
        result = read_i64(job.results, row) + 4 * first
        if job.up_weights != 0:
            up = read_i64(job.up_results, row) + 4 * first
            elementwise.gate(result, up, last - first)
        if job.row_factors != 0:
            elementwise.scale(result, last - first, read_f32(job.row_factors, row))


@cfunc(_body, cache=True)
def multiply(pointer):
    """Blocks of outputs of the groups; then the gate and the factors of the rows."""
    jobs = carray(pointer, 1)
    job = jobs[0]
    buffer = np.empty(SCRATCH_FLOATS, np.float32)
    scratch = (address_of(buffer) + 63) // 64 * 64
    num_blocks = (job.num_outputs + job.block_outputs - 1) // job.block_outputs
    task = take(address_of(jobs), 1)
    while task < num_blocks * job.num_groups:
        group = task // num_blocks
        first = (task - group * num_blocks) * job.block_outputs
        _multiply_block(job, group, first, scratch)
        task = take(address_of(jobs), 1)
    keep(buffer)


_BLOCKS_PER_THREAD: Final = 8
_MIN_PARALLEL_PRODUCTS: Final = 1 << 16
"""Multiply-adds below which waking the other threads costs more than they save (about 2 us)."""


@njit
def run(jobs, runtime):
    """Pack if need be, then multiply. runtime: see `Runtime` in runtime.py, by address."""
    job = jobs[0]
    num_rows, num_direct = read_i64(job.group_starts, job.num_groups), 0
    for group in range(job.num_groups):
        rows = read_i64(job.group_starts, group + 1) - read_i64(job.group_starts, group)
        num_direct += rows if is_direct(rows) else 0
    gomp, num_threads = read_i64(runtime, 0), read_i64(runtime, 1)
    if num_rows * job.num_outputs * job.length < _MIN_PARALLEL_PRODUCTS:
        num_threads = 1
    block = job.num_groups * job.num_outputs // (_BLOCKS_PER_THREAD * num_threads)
    job.block_outputs = max(16, min(256, (block + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS))
    if num_direct < num_rows:
        job.next_task = 0
        run_parallel(gomp, num_threads, read_i64(runtime, 2), address_of(jobs))
    job.next_task = 0
    run_parallel(gomp, num_threads, read_i64(runtime, 3), address_of(jobs))
