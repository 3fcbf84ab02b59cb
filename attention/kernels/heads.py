"""Products with a matrix of its own for each head: both sides of absorbed attention.

absorb: q'[t, h] = W_UK[h]^T q[t, h, :n], the query moved into the latent space; project: out[t, h]
= W_UV[h] u[t, h], the mixed latents moved back. One job of the linear kernels whose groups are the
heads, so heads share the threads and a row's bits depend on that row only.
"""

from __future__ import annotations

from numba import cfunc, njit, types

from experts.kernels import jobs
from experts.kernels.memory import read_i64, write_i64
from experts.kernels.pool import allocate, release
from experts.kernels.product import padded

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"


@njit
def multiply_heads(
    pool, kind, weights, head_bytes, num_heads, width, length, x, row_bytes, x_head_bytes, num_rows,
    out,
):  # fmt: skip
    """out [num_rows, num_heads, width] = W[h] x[t, h].

    weights: address of num_heads matrices [width, length] of `kind`, head_bytes apart; x: address
    of rows of length float32, x[t, h] at t * row_bytes + h * x_head_bytes.
    """
    num_pairs = num_heads * num_rows
    num_ints = jobs.JOB_FIELDS + 3 * (num_heads + 1) + 2 * num_pairs
    num_ints = (num_ints + 7) // 8 * 8
    job = allocate(pool, 8 * num_ints + 4 * num_pairs * padded(length))
    starts = job + 8 * jobs.JOB_FIELDS
    matrices, scales = starts + 8 * (num_heads + 1), starts + 16 * (num_heads + 1)
    rows = starts + 24 * (num_heads + 1)
    results = rows + 8 * num_pairs
    for head in range(num_heads):
        write_i64(starts, head, head * num_rows)
        write_i64(matrices, head, weights + head * head_bytes)
        write_i64(scales, head, 0)
        for t in range(num_rows):
            pair = head * num_rows + t
            write_i64(rows, pair, x + t * row_bytes + head * x_head_bytes)
            write_i64(results, pair, out + 4 * width * (t * num_heads + head))
    write_i64(starts, num_heads, num_pairs)
    write_i64(job, jobs.POOL, pool)
    write_i64(job, jobs.KIND, kind)
    write_i64(job, jobs.NUM_GROUPS, num_heads)
    write_i64(job, jobs.GROUP_STARTS, starts)
    write_i64(job, jobs.WEIGHTS, matrices)
    write_i64(job, jobs.SCALES, scales)
    write_i64(job, jobs.UP_WEIGHTS, 0)
    write_i64(job, jobs.ROW_FACTORS, 0)
    write_i64(job, jobs.NUM_OUTPUTS, width)
    write_i64(job, jobs.LENGTH, length)
    write_i64(job, jobs.X, rows)
    write_i64(job, jobs.RESULTS, results)
    write_i64(job, jobs.PACKED, job + 8 * num_ints)
    jobs.run(job)
    release(pool, job)


@cfunc(types.void(types.int64), cache=True)
def heads_driver(arguments):
    """The arguments of `multiply_heads` in their order, as int64 values at an address."""
    multiply_heads(
        read_i64(arguments, 0),
        read_i64(arguments, 1),
        read_i64(arguments, 2),
        read_i64(arguments, 3),
        read_i64(arguments, 4),
        read_i64(arguments, 5),
        read_i64(arguments, 6),
        read_i64(arguments, 7),
        read_i64(arguments, 8),
        read_i64(arguments, 9),
        read_i64(arguments, 10),
        read_i64(arguments, 11),
    )
