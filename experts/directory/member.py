"""A member as the roster knows it, and what an expert worker holds for certain. No I/O."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from experts.messages import Assign, WorkerInfo
from experts.placement.space import ExpertKey

FORGET_AFTER = 10
Exit = Literal["leave", "drain"]  # wants to stop, or shall stay without experts


@dataclass
class Member:
    """Of an expert worker: `wish` is what it shall hold, `told` the last Assign (None: none yet).

    `holds` is what it has for certain: its last report, less what it was told since to drop, for a
    report may have been on its way. `exit`: it hands over, until `released`; `num_to_move` experts
    that nobody else held when it began. `failed`: what it has not loaded within the limit, until it
    has, or has not been asked to for FORGET_AFTER limits; nothing waits for that.
    """

    info: WorkerInfo
    holds: set[ExpertKey]
    wish: set[ExpertKey]
    told: set[ExpertKey] | None = None
    exit: Exit | None = None
    released: bool = False
    num_to_move: int = 0
    failed: set[ExpertKey] = field(default_factory=set)
    _failed_at_s: float = 0.0
    _lacks: set[ExpertKey] = field(default_factory=set)
    _lacks_since_s: float = 0.0
    _dropped: dict[ExpertKey, int] = field(default_factory=dict)  # epoch of the Assign without it

    @property
    def published(self) -> set[ExpertKey]:
        return self.holds & self.wish

    @property
    def rests(self) -> bool:
        """It has what it shall have, or will not get it."""
        if not self.failed:
            return self.holds == self.wish
        return self.holds <= self.wish and self.wish - self.holds <= self.failed

    @property
    def hands_over(self) -> bool:
        return self.exit is not None and not self.released

    def report(self, experts: Iterable[ExpertKey], epoch: int) -> None:
        """It holds these, after the Assign of this epoch."""
        self._dropped = {key: told for key, told in self._dropped.items() if told > epoch}
        self.holds = {key for key in experts if key not in self._dropped}
        self.failed -= self.holds

    def give_up(self, now_s: float, limit_s: float) -> int:
        """How many experts have `failed` now: none of what it lacks has come for so long."""
        lacks = self.wish - self.holds - self.failed
        if lacks != self._lacks:
            self._lacks, self._lacks_since_s = lacks, now_s
        if not lacks or now_s - self._lacks_since_s < limit_s:
            return 0
        self.failed |= lacks
        self._failed_at_s = now_s
        return len(lacks)

    def forgive(self, now_s: float, limit_s: float) -> bool:
        """Let it try again what failed long ago and is held elsewhere now; whether there is any."""
        long_ago = now_s - self._failed_at_s >= FORGET_AFTER * limit_s
        if not long_ago or self.failed <= self.wish:
            return False
        self.failed &= self.wish
        return True

    def assign(self, epoch: int) -> Assign:
        """Tell it the wish: from now on it may drop the rest at any moment."""
        for key in (self.told or set()) | self.holds:
            if key not in self.wish:
                self._dropped[key] = epoch
        self.holds = self.published
        self.told = self.wish
        return Assign(epoch=epoch, experts=tuple(sorted(self.wish)))

    def begin_exit(self, reason: Exit) -> None:
        """Load no more; what it holds stays until others have it."""
        self.wish = self.published
        self.exit, self.released = reason, False

    def recall(self) -> None:
        """Drained no more."""
        self.exit, self.released = None, False

    def release(self) -> None:
        """It is no holder any more, though one that stops keeps its experts while it lasts."""
        self.released = True
        self.wish = set()
        if self.exit == "leave":
            self.holds, self.told = set(), self.wish
