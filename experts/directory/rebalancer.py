"""When a rebalancing step is made, and how it reaches the roster. No I/O, no threads.

A step takes up to a second of a core at V3 size, so it is made in three parts: `begin` copies what
it needs, `Step.plan` thinks, `finish` applies the plan if nothing has changed meanwhile. Only the
first and the last need the directory's lock.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from experts.directory.roster import Roster
from experts.placement.rebalance import Limits, Plan, rebalance
from experts.placement.space import ExpertSpace, Loads, Table, Unit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """All that a step depends on, at one generation of the roster."""

    generation: int
    space: ExpertSpace
    slots: Mapping[str, int]
    table: Table
    loads: Loads
    limits: Limits
    pins: Mapping[Unit, int]

    def plan(self) -> Plan:
        return rebalance(self.space, self.slots, self.table, self.loads, self.limits, self.pins)


class Rebalancer:
    """`loads()`: rows by layer, {} while there are none."""

    def __init__(self, roster: Roster, loads: Callable[[], Loads], now_s: float) -> None:
        self._roster = roster
        self._loads = loads
        self._last_step_s = now_s

    def is_due(self, now_s: float) -> bool:
        rules = self._roster.rules.rebalance
        return rules.enabled and now_s - self._last_step_s >= rules.every_s

    def begin(self, now_s: float) -> Step | str:
        """What to plan from; a line that says why not, if this is no moment for a step."""
        roster = self._roster
        if unrest := roster.unrest():
            return f"nothing moved: {unrest}"
        loads = self._loads()
        if not loads:
            return "nothing moved: no load has been reported yet"
        self._last_step_s = now_s
        space, table = roster.rules.space, roster.table()
        slots = roster.slots()
        return Step(
            roster.generation,
            space,
            {worker: max(slots[worker], len(held)) for worker, held in table.items()},
            table,
            loads,
            roster.rules.rebalance.limits(sum(slots.values()), space.unit_size),
            dict(roster.pins),
        )

    def finish(self, step: Step, plan: Plan) -> str:
        """Apply the plan; one line that says what was moved, or why nothing."""
        excess = f"busiest worker {plan.before.excess * 100:.0f} %"
        if not plan.moves:
            gain = f"{step.limits.min_gain * 100:g} %"
            return f"nothing moved: {excess} above the mean, no change gains {gain}"
        if self._roster.generation != step.generation:
            return "nothing moved: the pool has changed meanwhile, ask again"
        self._roster.adopt(plan.table)
        self._roster.counters.steps += 1
        self._roster.counters.moves += len(plan.moves)
        what = _what(plan, step.space.unit_size)
        balances = (plan.before.balancedness, plan.after.balancedness)
        logger.info("rebalanced: %s, balancedness %.3f -> %.3f (predicted)", what, *balances)
        return f"{what}, {excess} -> {plan.after.excess * 100:.0f} % above the mean"


def _what(plan: Plan, unit_size: int) -> str:
    gained = sum(move.gains is not None for move in plan.moves) * unit_size
    lost = sum(move.loses is not None for move in plan.moves) * unit_size
    verb, number, thing = ("moved", gained, "expert") if gained else ("dropped", lost, "replica")
    return f"{verb} {number} {thing}{'' if number == 1 else 's'}"
