"""The directory's own numbers, for those who collect the members' metrics. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import get_args

import numpy as np

from experts.directory.roster import Roster
from experts.load import ClusterLoad, layer_balance
from experts.messages import Role
from experts.metrics import Sample

NUM_TOP_EXPERTS = 16
MAX_LAYERS = 128
TIERS: tuple[Role, ...] = ("experts", "attention", "router")


def placement_samples(roster: Roster, window: ClusterLoad, recent: ClusterLoad) -> list[Sample]:
    """Both loads are of the roster's live expert workers."""
    snapshot, counters = roster.snapshot, roster.counters
    return [
        Sample("shoal_placement_epoch", (), snapshot.epoch),
        Sample("shoal_placement_ready", (), int(snapshot.ready)),
        Sample("shoal_expert_moves_total", (), counters.moves),
        *(
            Sample("shoal_worker_deaths_total", (("role", role),), counters.deaths[role])
            for role in get_args(Role)
        ),
        *_replicas(roster),
        *_layer_imbalance(roster.rules.space.moe_layers, window),
        *_top_experts(roster.rules.space.moe_layers, recent),
    ]


def _replicas(roster: Roster) -> Iterator[Sample]:
    """Wanted: by command, else as its policy or the configuration says, as far as it is known."""
    snapshot = roster.snapshot
    wanted = {**roster.sizes, **snapshot.scale}
    for tier in TIERS:
        labels = (("tier", tier),)
        yield Sample("shoal_replicas_present", labels, len(snapshot.workers_of(tier)))
        if tier in wanted:
            yield Sample("shoal_replicas_wanted", labels, wanted[tier])


def _layer_imbalance(layers: tuple[int, ...], window: ClusterLoad) -> Iterator[Sample]:
    """Rows of the busiest worker / mean of all; 1 is even, or idle."""
    by_worker = [rows.tolist() for rows in window.rows_by_worker.values()]
    balances = layer_balance(window.rows.tolist(), by_worker)
    for layer, balance in islice(zip(layers, balances, strict=True), MAX_LAYERS):
        yield Sample("shoal_layer_imbalance", (("layer", str(layer)),), 1 / balance.workers)


def _top_experts(layers: tuple[int, ...], recent: ClusterLoad) -> Iterator[Sample]:
    """The busiest experts by rank. Which ones they are is a value and not a label: else each of
    15,000 could become a series of its own. -1: no further expert had any rows."""
    flat = recent.rows.ravel()
    order = np.argsort(-flat, kind="stable")[:NUM_TOP_EXPERTS].tolist()
    for rank, place in enumerate(order, start=1):
        position, expert = divmod(place, recent.rows.shape[1])
        rows, labels = int(flat[place]), (("rank", str(rank)),)
        yield Sample("shoal_expert_rows_per_s", labels, rows / recent.window_s)
        yield Sample("shoal_expert_rank_layer", labels, layers[position] if rows else -1)
        yield Sample("shoal_expert_rank_expert", labels, expert if rows else -1)
