"""Compiled entry points: one call from Python computes a linear layer or a whole layer of experts.

All arguments are int64: addresses, counts, flags. The wrappers in `experts/linear.py` and
`experts/layer.py` check shapes and keep the tensors alive.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import cfunc, njit, types

from experts.kernels import elementwise
from experts.kernels.jobs import Job, run
from experts.kernels.memory import (
    address_of,
    keep,
    read_f32,
    read_i32,
    read_i64,
    write_i64,
)
from experts.kernels.product import padded

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

SLOT_COLUMNS: Final = 6
"""Of a slot's row in the table: addresses of gate, up, down and of their scales (0 without)."""


@njit
def _aligned(buffer):
    return (address_of(buffer) + 63) // 64 * 64


@njit
def _floats(count):
    return np.empty(count + 16, np.float32)


@njit
def _point(table, count, address, row_bytes):
    for i in range(count):
        write_i64(table, i, address + i * row_bytes)


@cfunc(types.void(*[types.int64] * 10), cache=True)
def linear_driver(
    runtime, kind, weights, scales, num_outputs, length, x, x_row_bytes, num_rows, y
):  # fmt: skip
    """y[m] = W x[m]; W [num_outputs, length], x rows of float32, y [num_rows, num_outputs]."""
    pointers = np.empty(2 * num_rows + 4, np.int64)
    table = address_of(pointers)
    rows, results = table + 32, table + 32 + 8 * num_rows
    _point(rows, num_rows, x, x_row_bytes)
    _point(results, num_rows, y, 4 * num_outputs)
    pointers[0], pointers[1], pointers[2], pointers[3] = 0, num_rows, weights, scales
    packed = _floats(num_rows * padded(length))
    jobs = np.zeros(1, Job)
    job = jobs[0]
    job.num_groups = 1
    job.group_starts = table
    job.kind = kind
    job.weights = table + 16
    job.scales = table + 24
    job.num_outputs = num_outputs
    job.length = length
    job.x = rows
    job.results = results
    job.packed = _aligned(packed)
    run(jobs, runtime)
    keep(pointers)
    keep(packed)
    keep(jobs)


@njit
def _sort_pairs(keys, count, num_keys, starts, order):
    """Stable counting sort: order[starts[k]:starts[k + 1]] are the pairs of key k, ascending."""
    for i in range(num_keys + 1):
        starts[i] = 0
    for i in range(count):
        starts[read_i32(keys, i) + 1] += 1
    for i in range(num_keys):
        starts[i + 1] += starts[i]
    for i in range(count):
        key = read_i32(keys, i)
        order[starts[key]] = i
        starts[key] += 1
    for i in range(num_keys, 0, -1):
        starts[i] = starts[i - 1]
    starts[0] = 0


@njit
def _first_bad_pair(row_ids, num_rows, slot_ids, num_slots, slots, count):
    """Index of the first pair whose row or slot does not exist or is empty, -1 if all are good."""
    for i in range(count):
        row, slot = read_i32(row_ids, i), read_i32(slot_ids, i)
        if row < 0 or row >= num_rows or slot < 0 or slot >= num_slots:
            return i
        if read_i64(slots, SLOT_COLUMNS * slot) == 0:
            return i
    return -1


@njit
def _group(starts, slots, num_slots, most):
    """Active slots -> ([SLOT_COLUMNS, G] addresses, [G + 1] first pairs)."""
    table = np.empty((SLOT_COLUMNS, most), np.int64)
    group_starts = np.empty(most + 1, np.int64)
    group = 0
    for slot in range(num_slots):
        if starts[slot + 1] > starts[slot]:
            group_starts[group] = starts[slot]
            for column in range(SLOT_COLUMNS):
                table[column, group] = read_i64(slots, slot * SLOT_COLUMNS + column)
            group += 1
    group_starts[group] = starts[num_slots]
    return table, group_starts[: group + 1]


@njit
def _sum_pairs(row_ids, num_pairs, pair_rows, num_rows, hidden, out):
    """out[t] = 0 + the pair rows of row t, added in the order of the pairs."""
    starts = np.empty(num_rows + 1, np.int64)
    order = np.empty(num_pairs, np.int64)
    _sort_pairs(row_ids, num_pairs, num_rows, starts, order)
    for row in range(num_rows):
        target = out + 4 * row * hidden
        elementwise.clear(target, hidden)
        for i in range(starts[row], starts[row + 1]):
            elementwise.add(target, pair_rows + 4 * order[i] * hidden, hidden)


@cfunc(types.int64(*[types.int64] * 15), cache=True)
def experts_driver(
    runtime, kind, slots, num_slots, hidden, width, x, x_row_bytes, num_rows, row_ids, slot_ids,
    pair_weights, num_pairs, pair_rows, out,
):  # fmt: skip
    """pair_rows[p] = weight[p] * expert of slot_ids[p] (x[row_ids[p]]), then out = their sums.

    slots [num_slots, SLOT_COLUMNS] int64, 0 in an empty slot; row_ids, slot_ids [P] int32;
    row_ids 0: every row meets slot 0; pair_weights [P] float32 or 0 (all ones);
    pair_rows [P, hidden]; out [num_rows, hidden] or 0.
    Returns -1, or the index of the first pair with a bad row or slot (nothing is computed then).
    """
    every_row = np.arange(num_rows if row_ids == 0 else 0).astype(np.int32)
    only_slot = np.zeros(len(every_row), np.int32)
    if row_ids == 0:
        row_ids, slot_ids = address_of(every_row), address_of(only_slot)
    bad = _first_bad_pair(row_ids, num_rows, slot_ids, num_slots, slots, num_pairs)
    if bad >= 0:
        return bad
    starts = np.empty(num_slots + 1, np.int64)
    order = np.empty(num_pairs, np.int64)
    _sort_pairs(slot_ids, num_pairs, num_slots, starts, order)
    table, group_starts = _group(starts, slots, num_slots, min(num_pairs, num_slots))
    pointers = np.empty((4, num_pairs), np.int64)
    factors = np.empty(num_pairs, np.float32)
    gated = _floats(num_pairs * width)
    spare = _floats(num_pairs * padded(width))  # up's results, then the packed gated rows
    packed = _floats(num_pairs * padded(hidden))
    for i in range(num_pairs):
        pair = order[i]
        pointers[0, i] = x + read_i32(row_ids, pair) * x_row_bytes
        pointers[1, i] = _aligned(gated) + 4 * i * width
        pointers[2, i] = _aligned(spare) + 4 * i * width
        pointers[3, i] = pair_rows + 4 * pair * hidden
        if pair_weights != 0:
            factors[i] = read_f32(pair_weights, pair)
    jobs = np.zeros(1, Job)
    job = jobs[0]
    columns, rows = address_of(table), address_of(pointers)
    column_bytes, row_bytes = 8 * table.shape[1], 8 * num_pairs
    job.num_groups = len(group_starts) - 1
    job.group_starts = address_of(group_starts)
    job.kind = kind
    job.num_outputs, job.length = width, hidden
    job.weights, job.scales = columns, columns + 3 * column_bytes
    job.up_weights, job.up_scales = columns + column_bytes, columns + 4 * column_bytes
    job.x, job.results, job.up_results = rows, rows + row_bytes, rows + 2 * row_bytes
    job.packed = _aligned(packed)
    run(jobs, runtime)
    job.num_outputs, job.length = hidden, width
    job.weights, job.scales = columns + 2 * column_bytes, columns + 5 * column_bytes
    job.up_weights = 0
    job.x, job.results = rows + row_bytes, rows + 3 * row_bytes
    job.row_factors = address_of(factors) if pair_weights != 0 else 0
    job.packed = _aligned(spare)
    run(jobs, runtime)
    if out != 0:
        _sum_pairs(row_ids, num_pairs, pair_rows, num_rows, hidden, out)
    keep(every_row)
    keep(only_slot)
    keep(table)
    keep(group_starts)
    keep(pointers)
    keep(factors)
    keep(gated)
    keep(spare)
    keep(packed)
    keep(jobs)
    return -1
