"""In which order units get further replicas. Pure."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from experts.placement.space import Unit

Holders = Mapping[Unit, Collection[str]]


def most_wanted_first(
    holders_of: Holders, loads: Mapping[Unit, float], workers: Sequence[str]
) -> Iterator[Unit]:
    """By load per replica, as far as it is known; then the least replicated. May repeat a unit."""
    known = [(-x / max(1, len(holders_of[unit])), unit) for unit, x in loads.items() if x > 0]
    yield from (unit for _, unit in sorted(known))
    yield from least_replicated_first(holders_of, workers)


def least_replicated_first(holders_of: Holders, workers: Sequence[str]) -> list[Unit]:
    """Units with the fewest holders first; among equals alternating over layers, then holders.

    So that a few replicas relieve all layers and all workers instead of the first ones.
    """
    rank = {worker: i for i, worker in enumerate(workers)}
    turn: Counter[tuple[int, int, int]] = Counter()  # of a holder in a lane
    lanes: dict[tuple[int, int], list[tuple[int, int, Unit]]] = {}  # by (holders, layer)
    for unit in sorted(holders_of):
        holders, layer = holders_of[unit], unit[0]
        holder = rank[min(holders)] if holders else 0
        bucket = (len(holders), layer, holder)
        first_holder = (holder + layer) % max(1, len(rank))  # another one in each layer
        lanes.setdefault(bucket[:2], []).append((turn[bucket], first_holder, unit))
        turn[bucket] += 1
    order = [
        (num_holders, position, unit)
        for (num_holders, _), lane in lanes.items()
        for position, (_, _, unit) in enumerate(sorted(lane))
    ]
    return [unit for _, _, unit in sorted(order)]
