"""Which worker computes which (token, expert) pair. Pure: tables and loads come in as arrays.

A token row travels at most once to each worker, with all its experts there, so the fewer workers
a token visits the fewer bytes move. Which replica computes a pair never changes the function.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from router.kernels.place import plan

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class Pairs(NamedTuple):
    """P pairs of a micro-batch, by row; those of one row by expert id."""

    rows: Int64s  # [P] ascending
    experts: Int64s  # [P] logical expert ids
    weights: Float32s  # [P]

    def take(self, index: Int64s) -> "Pairs":
        """The pairs at index [N], which must be ascending."""
        return Pairs(self.rows[index], self.experts[index], self.weights[index])


class Share(NamedTuple):
    """What one worker gets: R distinct rows and N pairs of them."""

    worker: int
    pair_index: Int64s  # [N] places in the Pairs, ascending
    row_index: Int64s  # [R] rows of the micro-batch to send, ascending
    row_ids: Int32s  # [N] 0..R-1: the row of each pair among those sent
    expert_ids: Int32s  # [N] logical
    weights: Float32s  # [N]


class Plan(NamedTuple):
    """Shares by ascending worker index, and the pairs that no usable worker holds."""

    shares: list[Share]
    unplaced: Int64s  # places in the Pairs


def plan_pairs(pairs: Pairs, holders: Int32s, usable: Bools, load: Int64s) -> Plan:
    """Give every pair to a usable worker that holds its expert: smallest cover, then least load.

    holders [E, R]: worker indices of each logical expert, -1 pads; usable [W]; load [W]: rows
    outstanding at each worker, not changed. Raises ValueError for an expert the table lacks.
    """
    bounds, row_bounds, index, row_ids, experts, weights, row_index = plan(
        pairs.rows, pairs.experts, pairs.weights, holders, usable, load
    )
    shares = []
    starts, row_starts = bounds.tolist(), row_bounds.tolist()
    for w in range(len(usable)):
        begin, end = starts[w], starts[w + 1]
        if begin < end:
            sent = row_index[row_starts[w] : row_starts[w + 1]]
            cut = slice(begin, end)
            shares.append(Share(w, index[cut], sent, row_ids[cut], experts[cut], weights[cut]))
    return Plan(shares, index[starts[-1] :])
