"""Compiled entry points: one call from Python computes a linear layer or a whole layer of experts.

The argument is the address of int64 values: addresses, counts and flags, in the order in which they
are read. (One packed argument: ctypes takes 0.2 us to convert each of ten.) The wrappers in
`experts/linear.py` and `experts/layer.py` check shapes and keep the tensors alive.
"""

from __future__ import annotations

from typing import Final

from numba import cfunc, njit, types

from experts.kernels import elementwise
from experts.kernels.jobs import (
    GROUP_STARTS,
    JOB_FIELDS,
    KIND,
    LENGTH,
    NUM_GROUPS,
    NUM_OUTPUTS,
    PACKED,
    POOL,
    RESULTS,
    ROW_FACTORS,
    SCALES,
    UP_RESULTS,
    UP_SCALES,
    UP_WEIGHTS,
    WEIGHTS,
    X,
    run,
)
from experts.kernels.memory import read_f32, read_i32, read_i64, write_f32, write_i32, write_i64
from experts.kernels.pool import allocate, release
from experts.kernels.product import padded

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

SLOT_COLUMNS: Final = 6
"""Of a slot's row in the table: addresses of gate, up, down and of their scales (0 without)."""


@njit(inline="always")
def _lines(num_bytes):
    """Rounded up to whole cache lines."""
    return (num_bytes + 63) // 64 * 64


@cfunc(types.void(types.int64), cache=True)
def linear_driver(arguments):
    """y[m] = W x[m]; W [num_outputs, length], x rows of float32, y [num_rows, num_outputs]."""
    pool, kind = read_i64(arguments, 0), read_i64(arguments, 1)
    weights, scales = read_i64(arguments, 2), read_i64(arguments, 3)
    num_outputs, length = read_i64(arguments, 4), read_i64(arguments, 5)
    x, x_row_bytes = read_i64(arguments, 6), read_i64(arguments, 7)
    num_rows, y = read_i64(arguments, 8), read_i64(arguments, 9)
    num_ints = JOB_FIELDS + 4 + 2 * num_rows
    job = allocate(pool, _lines(8 * num_ints) + 4 * num_rows * padded(length))
    table = job + 8 * JOB_FIELDS  # group_starts [2], weights [1], scales [1]
    rows, results = table + 32, table + 32 + 8 * num_rows
    write_i64(table, 0, 0)
    write_i64(table, 1, num_rows)
    write_i64(table, 2, weights)
    write_i64(table, 3, scales)
    for m in range(num_rows):
        write_i64(rows, m, x + m * x_row_bytes)
        write_i64(results, m, y + 4 * m * num_outputs)
    write_i64(job, POOL, pool)
    write_i64(job, KIND, kind)
    write_i64(job, NUM_GROUPS, 1)
    write_i64(job, GROUP_STARTS, table)
    write_i64(job, WEIGHTS, table + 16)
    write_i64(job, SCALES, table + 24)
    write_i64(job, UP_WEIGHTS, 0)
    write_i64(job, ROW_FACTORS, 0)
    write_i64(job, NUM_OUTPUTS, num_outputs)
    write_i64(job, LENGTH, length)
    write_i64(job, X, rows)
    write_i64(job, RESULTS, results)
    write_i64(job, PACKED, job + _lines(8 * num_ints))
    run(job)
    release(pool, job)


@njit
def _sort(keys, count, lowest, num_keys, starts, order):
    """Stable counting sort: order[starts[k]:starts[k + 1]] are the positions of lowest + k.

    keys [count] int32 in lowest..lowest + num_keys - 1; starts [num_keys + 1], order [count] int64.
    """
    for i in range(num_keys + 1):
        write_i64(starts, i, 0)
    for i in range(count):
        key = read_i32(keys, i) - lowest
        write_i64(starts, key + 1, read_i64(starts, key + 1) + 1)
    for i in range(num_keys):
        write_i64(starts, i + 1, read_i64(starts, i + 1) + read_i64(starts, i))
    for i in range(count):
        key = read_i32(keys, i) - lowest
        place = read_i64(starts, key)
        write_i64(order, place, i)
        write_i64(starts, key, place + 1)
    for i in range(num_keys, 0, -1):
        write_i64(starts, i, read_i64(starts, i - 1))
    write_i64(starts, 0, 0)


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


@njit(inline="always")
def _slot_range(slot_ids, count):
    """(lowest slot, number of slots from there to the highest); (0, 0) without pairs.

    A worker holds experts of all layers, a call names those of one, which lie close together.
    """
    lowest, highest = 0, -1
    for i in range(count):
        slot = read_i32(slot_ids, i)
        lowest = slot if i == 0 else min(lowest, slot)
        highest = max(highest, slot)
    return lowest, highest - lowest + 1


@njit(inline="always")
def _group(starts, slots, num_slots, table, columns, group_starts):
    """Active slots -> table [SLOT_COLUMNS, columns], group_starts; returns how many there are."""
    group = 0
    for slot in range(num_slots):
        if read_i64(starts, slot + 1) > read_i64(starts, slot):
            write_i64(group_starts, group, read_i64(starts, slot))
            for column in range(SLOT_COLUMNS):
                address = read_i64(slots, slot * SLOT_COLUMNS + column)
                write_i64(table, column * columns + group, address)
            group += 1
    write_i64(group_starts, group, read_i64(starts, num_slots))
    return group


@njit(inline="always")
def _sum_pairs(starts, order, pair_rows, num_rows, hidden, out):
    """out[t] = 0 + the pair rows of row t, added in the order of the pairs."""
    for row in range(num_rows):
        target = out + 4 * row * hidden
        elementwise.clear(target, hidden)
        for i in range(read_i64(starts, row), read_i64(starts, row + 1)):
            elementwise.add(target, pair_rows + 4 * read_i64(order, i) * hidden, hidden)


@cfunc(types.int64(types.int64), cache=True)
def experts_driver(arguments):
    """pair_rows[p] = weight[p] * expert of slot_ids[p] (x[row_ids[p]]), then out = their sums.

    slots [num_slots, SLOT_COLUMNS] int64, 0 in an empty slot; row_ids, slot_ids [P] int32;
    row_ids 0: every row meets slot 0; pair_weights [P] float32 or 0 (all ones);
    pair_rows [P, hidden], or 0 when only their sums are asked for; out [num_rows, hidden] or 0.
    Returns -1, or the index of the first pair with a bad row or slot (nothing is computed then).
    """
    pool, kind = read_i64(arguments, 0), read_i64(arguments, 1)
    slots, num_slots = read_i64(arguments, 2), read_i64(arguments, 3)
    hidden, width = read_i64(arguments, 4), read_i64(arguments, 5)
    x, x_row_bytes = read_i64(arguments, 6), read_i64(arguments, 7)
    num_rows, num_pairs = read_i64(arguments, 8), read_i64(arguments, 9)
    row_ids, slot_ids = read_i64(arguments, 10), read_i64(arguments, 11)
    pair_weights = read_i64(arguments, 12)
    pair_rows, out = read_i64(arguments, 13), read_i64(arguments, 14)

    lowest, num_slots_named = 0, 1
    if row_ids != 0:
        bad = _first_bad_pair(row_ids, num_rows, slot_ids, num_slots, slots, num_pairs)
        if bad >= 0:
            return bad
        lowest, num_slots_named = _slot_range(slot_ids, num_pairs)
    most = min(num_pairs, num_slots_named)
    num_ints = JOB_FIELDS + (SLOT_COLUMNS + 1) * most + 1 + 7 * num_pairs
    num_ints += max(num_slots_named, num_rows) + 1
    row_bytes, wide_bytes = 4 * num_pairs * padded(width), 4 * num_pairs * padded(hidden)
    summed_bytes = 0 if pair_rows != 0 else 4 * num_pairs * hidden
    bytes_before = _lines(8 * num_ints) + _lines(2 * row_bytes) + _lines(wide_bytes)
    job = allocate(pool, bytes_before + summed_bytes)
    if pair_rows == 0:
        pair_rows = job + bytes_before
    table = job + 8 * JOB_FIELDS  # [SLOT_COLUMNS, most]
    group_starts = table + 8 * SLOT_COLUMNS * most
    pointers = group_starts + 8 * (most + 1)  # x, gated, up, result: [4, P]
    order = pointers + 32 * num_pairs
    factors = order + 8 * num_pairs
    ids = factors + 8 * num_pairs
    starts = ids + 8 * num_pairs
    gated = job + _lines(8 * num_ints)
    spare = gated + row_bytes  # up's results, then the packed gated rows
    packed = gated + _lines(2 * row_bytes)

    if row_ids == 0:
        row_ids, slot_ids = ids, ids + 4 * num_pairs
        for i in range(num_pairs):
            write_i32(row_ids, i, i)
            write_i32(slot_ids, i, 0)
    _sort(slot_ids, num_pairs, lowest, num_slots_named, starts, order)
    first_slot = slots + 8 * SLOT_COLUMNS * lowest
    num_groups = _group(starts, first_slot, num_slots_named, table, most, group_starts)
    for i in range(num_pairs):
        pair = read_i64(order, i)
        write_i64(pointers, i, x + read_i32(row_ids, pair) * x_row_bytes)
        write_i64(pointers, num_pairs + i, gated + 4 * i * width)
        write_i64(pointers, 2 * num_pairs + i, spare + 4 * i * width)
        write_i64(pointers, 3 * num_pairs + i, pair_rows + 4 * pair * hidden)
        if pair_weights != 0:
            write_f32(factors, i, read_f32(pair_weights, pair))

    write_i64(job, POOL, pool)
    write_i64(job, KIND, kind)
    write_i64(job, NUM_GROUPS, num_groups)
    write_i64(job, GROUP_STARTS, group_starts)
    write_i64(job, NUM_OUTPUTS, width)
    write_i64(job, LENGTH, hidden)
    write_i64(job, WEIGHTS, table)
    write_i64(job, UP_WEIGHTS, table + 8 * most)
    write_i64(job, SCALES, table + 24 * most)
    write_i64(job, UP_SCALES, table + 32 * most)
    write_i64(job, X, pointers)
    write_i64(job, RESULTS, pointers + 8 * num_pairs)
    write_i64(job, UP_RESULTS, pointers + 16 * num_pairs)
    write_i64(job, ROW_FACTORS, 0)
    write_i64(job, PACKED, packed)
    run(job)
    write_i64(job, NUM_OUTPUTS, hidden)
    write_i64(job, LENGTH, width)
    write_i64(job, WEIGHTS, table + 16 * most)
    write_i64(job, UP_WEIGHTS, 0)
    write_i64(job, SCALES, table + 40 * most)
    write_i64(job, X, pointers + 8 * num_pairs)
    write_i64(job, RESULTS, pointers + 24 * num_pairs)
    write_i64(job, ROW_FACTORS, factors if pair_weights != 0 else 0)
    write_i64(job, PACKED, spare)
    run(job)
    if out != 0:
        _sort(row_ids, num_pairs, 0, num_rows, starts, order)
        _sum_pairs(starts, order, pair_rows, num_rows, hidden, out)
    release(pool, job)
    return -1
