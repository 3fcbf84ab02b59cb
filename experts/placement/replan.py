"""Which worker holds which expert while workers come and go: pure decisions, no I/O.

`replan` starts from what workers hold now and changes as little as it can. It places *units*:
single experts, or whole routing groups where the model is group-limited, so that a token reaches at
most `topk_group` workers. (`rebalance.py` moves replicas to where the load is; `eplb.py` has the
planner for known loads on a fixed grid of GPUs.)

Invariants: no worker above its slots, spare ones included; spare slots only for what would have no
holder; no worker with two replicas of one expert; groups whole; full coverage whenever the slots
allow it; what one worker alone holds for certain stays there; the same answer whatever the order of
the arguments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from experts.placement.space import ExpertKey, ExpertSpace, PlacementError, Unit
from experts.placement.unit_board import Pool, UnitBoard


@dataclass(frozen=True)
class Aims:
    """What a plan shall bring about beyond coverage.

    `redundancy`: slots of the pool that take replicas. `joiners` came to take load and are filled
    to their last normal slot. `pins`: least number of holders by unit. `loads`: by unit, {} while
    unknown.
    """

    redundancy: int = 0
    joiners: Sequence[str] = ()
    pins: Mapping[Unit, int] = field(default_factory=dict)
    loads: Mapping[Unit, float] = field(default_factory=dict)


def slots_needed(
    num_experts_total: int, num_workers: int, redundancy: int, unit_size: int = 1
) -> int:
    """Slots a worker needs so that equal ones hold every expert and `redundancy` replicas."""
    num_units = -(-(num_experts_total + redundancy) // unit_size)
    return -(-num_units // num_workers) * unit_size


def check_slots(space: ExpertSpace, slots: Mapping[str, int]) -> None:
    """Raise PlacementError unless the slots (worker_id -> number) can hold every expert once."""
    usable = sum(number // space.unit_size for number in slots.values()) * space.unit_size
    if usable < space.num_total:
        whole = f" usable in whole groups of {space.unit_size}" if space.unit_size > 1 else ""
        raise PlacementError(
            f"needs {space.num_total} expert slots, have {usable}{whole} on {len(slots)} workers: "
            "add workers or slots"
        )


def initial_table(
    space: ExpertSpace, slots: Mapping[str, int], redundancy: int = 0
) -> dict[str, list[ExpertKey]]:
    """First assignment of all experts, even per layer and over workers; raises PlacementError.

    `slots`: worker_id -> number of slots. `redundancy` slots of the pool take replicas, as far as
    there is room.
    """
    check_slots(space, slots)
    return replan(space, Pool(slots, {}), Aims(redundancy))


def replan(space: ExpertSpace, pool: Pool, aims: Aims | None = None) -> dict[str, list[ExpertKey]]:
    """What every live worker shall hold, given what it holds (or is loading) now.

    Orphans (no holder, or only one that leaves) go to free slots, then to slots of replicas, then
    to spare slots, last to slots of pinned replicas. What a worker could not load goes to another
    one that has room, and from the first by a later plan. Pinned units get their holders. Who uses
    spare slots gives back: a replica at once, another unit by a copy elsewhere, so that the next
    plan finds a replica. Joiners are filled, the hottest units per replica first. Last, the least
    replicated get replicas until `redundancy` slots beyond coverage are in use.
    """
    aims = aims or Aims()
    board = UnitBoard(space, pool, aims.pins, aims.loads)
    board.place_orphans()
    board.replace_failed()
    board.ensure_pins()
    board.give_back()
    for joiner in aims.joiners:
        board.fill(joiner)
    board.add_replicas(aims.redundancy // space.unit_size)
    return board.table()
