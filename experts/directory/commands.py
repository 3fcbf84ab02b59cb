"""Commands to the expert pool: checked against the roster, then applied to it. No I/O.

Each returns one line for people, or raises CommandRefused: what, why and what to do.
"""

import secrets
from collections.abc import Iterable

from experts.directory.roster import Roster
from experts.messages import Chaos, CommandRefused, Drain, Replicate, Scale, Snapshot
from experts.placement.replan import check_slots
from experts.placement.space import PlacementError

_NUM_NAMES = 8  # of workers in a refusal


def carry_out(roster: Roster, command: Drain | Replicate | Scale) -> str:
    """Raises CommandRefused; the caller settles the roster."""
    if isinstance(command, Drain):
        return _drain(roster, command)
    if isinstance(command, Replicate):
        return _replicate(roster, command)
    return _scale(roster, command)


def target_of(chaos: Chaos, snapshot: Snapshot) -> str:
    """The worker that is meant, or any one of the role. Raises CommandRefused."""
    live = [worker.worker_id for worker in snapshot.workers_of(chaos.role)]
    if not live or chaos.worker_id not in (None, *live):
        which = chaos.worker_id or "worker"
        raise CommandRefused(f"no {which} of role {chaos.role}: {_one_of(live)}")
    return chaos.worker_id or secrets.choice(live)


def _one_of(names: Iterable[str]) -> str:
    """The names to choose from, in a refusal."""
    known = sorted(names)
    more = f" and {len(known) - _NUM_NAMES} more" if len(known) > _NUM_NAMES else ""
    return f"one of {', '.join(known[:_NUM_NAMES])}{more}" if known else "there is none"


def _drain(roster: Roster, command: Drain) -> str:
    worker = command.worker_id
    member = roster.experts().get(worker)
    if member is None:
        raise CommandRefused(f"no expert worker {worker}: {_one_of(roster.experts())}")
    if member.exit is not None:
        return f"{worker} is drained" if member.released else f"{worker} hands over already"
    others = {name: slots for name, slots in roster.all_slots().items() if name != worker}
    try:
        check_slots(roster.rules.space, others)
    except PlacementError as error:
        raise CommandRefused(f"cannot drain {worker}: without it the pool {error}") from None
    held = len(member.published)
    roster.hand_over(worker, "drain")
    return f"{worker} hands over its {held} experts"


def _replicate(roster: Roster, command: Replicate) -> str:
    space, replicas = roster.rules.space, command.replicas
    key = (command.layer, command.expert)
    if key not in space:
        layers = f"{space.moe_layers[0]} to {space.moe_layers[-1]}"
        raise CommandRefused(
            f"no expert {command.expert} in layer {command.layer}: the model has experts 0 to "
            f"{space.num_experts - 1} in layers {layers}"
        )
    unit = space.unit_of(key)
    capacity = [slots // space.unit_size for slots in roster.slots().values()]
    workers, have = sum(units > 0 for units in capacity), sum(capacity) * space.unit_size
    if replicas > max(1, workers):
        raise CommandRefused(
            f"{replicas} replicas need as many expert workers, have {workers}: add workers"
        )
    further = sum(number - 1 for number in {**roster.pins, unit: replicas}.values())
    needed = space.num_total + further * space.unit_size
    if needed > have and replicas > 1:
        raise CommandRefused(
            f"every expert and all pinned replicas need {needed} slots, have {have} on {workers} "
            "workers: add workers, or pin fewer"
        )
    roster.pin(unit, replicas)
    group = "the group of " if space.unit_size > 1 else ""
    what = f"{group}expert {command.expert} of layer {command.layer}"
    if replicas == 1:
        return f"{what} is no longer pinned"
    return f"{what}: at least {replicas} replicas from now on"


def _scale(roster: Roster, command: Scale) -> str:
    role, workers = command.role, command.workers
    if workers is None:
        roster.set_scale(role, None)
        return f"{role}: as the policy says"
    most = roster.rules.max_workers.get(role, workers)
    if workers > most:
        setting = f"{role}.scaling.max_workers"
        raise CommandRefused(f"{workers} {role} workers are more than {setting} = {most}: raise it")
    space = roster.rules.space
    slots = max((member.info.num_slots for member in roster.experts().values()), default=0)
    if role == "experts" and slots >= space.unit_size:
        num_units, room = space.num_total // space.unit_size, slots // space.unit_size
        least = -(-num_units // room)
        if workers < least:
            raise CommandRefused(
                f"{workers} expert workers of {slots} slots cannot hold {space.num_total} experts: "
                f"{least} at least"
            )
    roster.set_scale(role, workers)
    return f"{role}: {workers} workers from now on"
