"""RMS norm of rows, with the residual addition in front of it, and the rotary step of MLA.

As torch operations each of these is 4-8 calls of 2-5 us; a decode step has some fifty of them. The
rows are short and stay in the cache, so one thread is enough. A row's bits do not depend on the
other rows. Plain-torch twins: attention/layers.py.
"""

from typing import Any

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, fastmath=True)  # type: ignore[untyped-decorator]
def rms_norm_rows(x: Any, weight: Any, eps: float, out: Any) -> None:
    """out = weight * x / sqrt(mean(x^2) + eps); x, out [T, d] float32, weight [d] float32."""
    width = x.shape[1]
    for t in range(x.shape[0]):
        total = np.float32(0.0)
        for i in range(width):
            total += x[t, i] * x[t, i]
        factor = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for i in range(width):
            out[t, i] = x[t, i] * factor * weight[i]


@njit(nogil=True, cache=True, fastmath=True)  # type: ignore[untyped-decorator]
def add_rms_norm_rows(x: Any, delta: Any, weight: Any, eps: float, out: Any) -> None:
    """x += delta, then out = rms_norm(x); all [T, d] float32, weight [d] float32."""
    width = x.shape[1]
    for t in range(x.shape[0]):
        total = np.float32(0.0)
        for i in range(width):
            value = x[t, i] + delta[t, i]
            x[t, i] = value
            total += value * value
        factor = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for i in range(width):
            out[t, i] = x[t, i] * factor * weight[i]


@njit(nogil=True, cache=True, fastmath=True)  # type: ignore[untyped-decorator]
def rotate_and_store(
    q: Any, kv_a: Any, norm: Any, eps: float, table: Any, positions: Any, slots: Any, cache: Any
) -> None:
    """Turn the queries in place; norm each latent, turn its key and put both in the cache.

    q [T, H, n + r] float32: the last r of a head are turned. kv_a [T, c + r] float32; norm [c]
    float32; table [P, r] float32 (cos, then sin); positions [T] int32 < P; slots [T] int64; cache
    [num_slots, c + r] float32, row slots[t] is written.
    """
    latent, half = norm.shape[0], table.shape[1] // 2
    nope = q.shape[2] - 2 * half
    for t in range(q.shape[0]):
        row, place = table[positions[t]], cache[slots[t]]
        for h in range(q.shape[1]):
            for i in range(half):
                a, b = q[t, h, nope + 2 * i], q[t, h, nope + 2 * i + 1]
                q[t, h, nope + 2 * i] = a * row[i] - b * row[half + i]
                q[t, h, nope + 2 * i + 1] = a * row[half + i] + b * row[i]
        total = np.float32(0.0)
        for i in range(latent):
            total += kv_a[t, i] * kv_a[t, i]
        factor = np.float32(1.0) / np.sqrt(total / np.float32(latent) + np.float32(eps))
        for i in range(latent):
            place[i] = kv_a[t, i] * factor * norm[i]
        for i in range(half):
            a, b = kv_a[t, latent + 2 * i], kv_a[t, latent + 2 * i + 1]
            place[latent + 2 * i] = a * row[i] - b * row[half + i]
            place[latent + 2 * i + 1] = a * row[half + i] + b * row[i]
