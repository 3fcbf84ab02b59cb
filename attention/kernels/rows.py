"""RMS norm of rows, with the residual addition in front of it, and the rotary step of MLA.

As torch operations each of these is 4-8 calls of 2-5 us, and a decode step has some fifty of them.
The rows are short and stay in the cache, so one thread is enough. A row's bits do not depend on the
other rows. Plain-torch twins: attention/layers.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from experts.kernels.memory import read_f32, read_i64

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"


def _array_maker(element: Any, llvm_element: Any) -> Any:
    @intrinsic
    def pointer_to(_context, _address):
        def codegen(_context, b, _signature, args):
            return b.inttoptr(args[0], llvm_element.as_pointer())

        return types.CPointer(element)(types.int64), codegen

    @njit
    def array_at(address, rows, width):
        """The array [rows, width] at an address, which the caller keeps alive."""
        return carray(pointer_to(address), (rows, width))

    return array_at


floats_at = _array_maker(types.float32, ir.FloatType())
int32s_at = _array_maker(types.int32, ir.IntType(32))
int64s_at = _array_maker(types.int64, ir.IntType(64))


@njit(fastmath=True)
def norm_row(source, count, weight, eps, target):
    """target = weight * source / sqrt(mean(source^2) + eps) over the first `count` values."""
    total = np.float32(0.0)
    for i in range(count):
        total += source[i] * source[i]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(count) + np.float32(eps))
    for i in range(count):
        target[i] = source[i] * factor * weight[i]


@njit
def norm_rows(x, weight, eps, out):
    """x, out [T, d] float32, weight [1, d]."""
    for t in range(x.shape[0]):
        norm_row(x[t], x.shape[1], weight[0], eps, out[t])


@njit
def add_norm_rows(x, delta, weight, eps, out):
    """x += delta, then out = norm of x; all [T, d] float32, weight [1, d]."""
    for t in range(x.shape[0]):
        row, more = x[t], delta[t]
        for i in range(x.shape[1]):
            row[i] += more[i]
        norm_row(row, x.shape[1], weight[0], eps, out[t])


@njit
def _turn(source, target, start, row, half):
    """Turn pairs (start, start + 1), .. by the angles of a table row."""
    for i in range(half):
        a, b = source[start + 2 * i], source[start + 2 * i + 1]
        target[start + 2 * i] = a * row[i] - b * row[half + i]
        target[start + 2 * i + 1] = a * row[half + i] + b * row[i]


@njit
def rotate_and_store(q, kv_a, weight, eps, table, positions, slots, cache, num_heads):
    """Turn the queries in place; norm each latent, turn its key and put both in the cache.

    q [T, H * (n + r)]: the last r of a head are turned. kv_a [T, c + r]; weight [1, c]; table
    [positions, r] (cos, then sin); positions [1, T] int32; slots [1, T] int64, rows of cache
    [num_slots, c + r]. Everything else float32.
    """
    latent, rope = weight.shape[1], table.shape[1]
    head = q.shape[1] // num_heads
    for t in range(q.shape[0]):
        row, place = table[positions[0, t]], cache[slots[0, t]]
        for h in range(num_heads):
            _turn(q[t], q[t], (h + 1) * head - rope, row, rope // 2)
        norm_row(kv_a[t], latent, weight[0], eps, place)
        _turn(kv_a[t], place, latent, row, rope // 2)


@cfunc(types.void(types.int64), cache=True)
def norm_driver(a):
    """x, weight, out, T, d, eps (float32), delta or 0. See norm_rows and add_norm_rows."""
    rows, width, eps = read_i64(a, 3), read_i64(a, 4), read_f32(a, 10)
    x, out = floats_at(read_i64(a, 0), rows, width), floats_at(read_i64(a, 2), rows, width)
    weight = floats_at(read_i64(a, 1), 1, width)
    if read_i64(a, 6) == 0:
        norm_rows(x, weight, eps, out)
    else:
        add_norm_rows(x, floats_at(read_i64(a, 6), rows, width), weight, eps, out)


@cfunc(types.void(types.int64), cache=True)
def rotate_driver(a):
    """q, kv_a, weight, table, positions, slots, cache; T, q's width, c, r, number of positions, of
    slots, of heads; eps (float32). See rotate_and_store."""
    rows, q_width, latent, rope = (
        read_i64(a, 7),
        read_i64(a, 8),
        read_i64(a, 9),
        read_i64(a, 10),
    )
    rotate_and_store(
        floats_at(read_i64(a, 0), rows, q_width),
        floats_at(read_i64(a, 1), rows, latent + rope),
        floats_at(read_i64(a, 2), 1, latent),
        read_f32(a, 28),
        floats_at(read_i64(a, 3), read_i64(a, 11), rope),
        int32s_at(read_i64(a, 4), 1, rows),
        int64s_at(read_i64(a, 5), 1, rows),
        floats_at(read_i64(a, 6), read_i64(a, 12), latent + rope),
        read_i64(a, 13),
    )
