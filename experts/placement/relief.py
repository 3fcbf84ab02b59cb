"""Which change to the table takes load off the busiest worker of a layer. Pure.

An action pays if it takes at least `min_gain` (relative) off the busiest worker, brings nobody else
up there, and raises no other layer's peak, or less than it lowers this one. So the sum of the peaks
never grows, and with loads that stay the search comes to an end.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from experts.placement.slot_board import Action, Change, SlotBoard
from experts.placement.space import Unit

_NUM_TARGETS = 3  # workers tried for one unit, lightest first
_NUM_HOT, _NUM_COLD = 3, 3  # units tried for making room: of the busiest, of a full worker
_NOBODY = -1
_ROUNDING = 1e-9  # relative


class _Option(NamedTuple):
    """A way to relieve the busiest worker; the least is the best."""

    peak: float  # of the workers that gain or lose load
    num_loads: int
    unit: Unit
    leaves: bool  # the busiest worker drops its replica
    target: int  # worker that gains a replica, or _NOBODY


def search(board: SlotBoard, layers: set[int], min_gain: float) -> list[tuple[int, Action]]:
    """Relieve the layer with the most to gain, again and again; (layer, action), applied."""
    found: list[tuple[int, Action]] = []
    excess = {
        layer: board.excess(layer)
        for layer in sorted(layers)
        if board.excess(layer) > min_gain * board.peak[layer]
    }
    while excess:
        layer = max(excess, key=excess.__getitem__)
        action = _relieve(board, layer, min_gain)
        if action is None:
            del excess[layer]
            continue
        found.append((layer, action))
        board.apply(action)
        for other in {unit[0] for change in action for unit in change[1:] if unit} & set(excess):
            excess[other] = board.excess(other)
    return found


def _relieve(board: SlotBoard, layer: int, min_gain: float) -> Action | None:
    """The action that takes most off the busiest worker of the layer, None if none is worth it."""
    row = board.rows[layer]
    busiest = row.index(board.peak[layer])
    lightest_first = sorted(range(len(row)), key=lambda worker: (row[worker], worker))
    limit = (1 - min_gain) * board.peak[layer]
    options: list[_Option] = []
    for unit in board.held[layer][busiest]:
        if row[busiest] - board.share(unit) <= limit:
            ways = _options(board, unit, busiest, lightest_first)
            options += (option for option in ways if option.peak <= limit)
    slots: dict[int, Unit | None] = {}  # of the workers tried: what would be dropped there
    for _, _, unit, leaves, target in sorted(options):
        action: Action = (Change(busiest, None, unit),) if leaves else ()
        if target != _NOBODY:
            if target not in slots:
                slots[target] = board.cheapest_slot(target)
            action += (Change(target, unit, slots[target]),)
        if _pays(board, layer, action, min_gain):
            return action
    return None


def _options(
    board: SlotBoard, unit: Unit, busiest: int, lightest_first: list[int]
) -> Iterator[_Option]:
    """Ways to take load off the busiest worker; what a slot for it costs is not in the peak."""
    row, share, load = board.rows[unit[0]], board.share(unit), board.load[unit]
    others = [worker for worker in board.holders[unit] if worker != busiest]
    thinner = load / (len(others) + 2)
    may_leave = unit in board.spare[busiest]
    if may_leave:
        highest = max(row[other] for other in others) + load / len(others) - share
        yield _Option(max(row[busiest] - share, highest), 0, unit, True, _NOBODY)
    targets = (w for w in lightest_first if w not in board.holders[unit] and board.has_slot(w))
    for target in itertools.islice(targets, _NUM_TARGETS):
        replicated = max(row[busiest] - share + thinner, row[target] + thinner)
        yield _Option(replicated, 1, unit, False, target)
        if may_leave:
            moved = max(row[busiest] - share, row[target] + share)
            yield _Option(moved, 1, unit, True, target)


def _pays(board: SlotBoard, layer: int, action: Action, min_gain: float) -> bool:
    """Fewer workers near the layer's peak; no other peak rises, or less than this one falls."""
    after = board.rows_after(action)
    limit = (1 - min_gain) * board.peak[layer]
    if sum(x > limit for x in after[layer]) >= sum(x > limit for x in board.rows[layer]):
        return False
    change = {other: max(row) - board.peak[other] for other, row in after.items()}
    harmless = all(rise <= _ROUNDING * board.peak[other] for other, rise in change.items())
    return harmless or -sum(change.values()) >= min_gain * board.peak[layer]


def room_for_relief(board: SlotBoard, layer: int, min_gain: float) -> Action | None:
    """A copy of a cold unit of a full worker that lets the busiest worker be relieved there."""
    row = board.rows[layer]
    lightest_first = sorted(range(len(row)), key=lambda worker: (row[worker], worker))
    busiest = row.index(board.peak[layer])
    full = [worker for worker in lightest_first if not board.has_slot(worker)]
    by_share = sorted(board.held[layer][busiest], key=lambda u: (-board.share(u), u))
    for unit, target in itertools.product(by_share[:_NUM_HOT], full[:_NUM_TARGETS]):
        if target in board.holders[unit]:
            continue
        for cold in _coldest(board, target):
            copy = _copy_elsewhere(board, cold)
            if copy and _pays(board, layer, (copy, Change(target, unit, cold)), min_gain):
                return (copy,)
    return None


def _coldest(board: SlotBoard, worker: int) -> list[Unit]:
    held = (unit for units in board.held.values() for unit in units[worker])
    return sorted(held, key=lambda unit: (board.share(unit), unit))[:_NUM_COLD]


def _copy_elsewhere(board: SlotBoard, unit: Unit) -> Change | None:
    """A further replica where there is a slot, if no peak rises by it."""
    row = board.rows[unit[0]]
    for worker in sorted(range(len(row)), key=lambda w: (row[w], w)):
        if worker not in board.holders[unit] and board.has_slot(worker):
            copy = Change(worker, unit, board.cheapest_slot(worker))
            after = board.rows_after((copy,))
            if all(max(row) <= board.peak[layer] for layer, row in after.items()):
                return copy
    return None
