"""A member as the roster knows it, and what an expert worker holds for certain. No I/O."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from experts.messages import Assign, WorkerInfo
from experts.placement.space import ExpertKey

Exit = Literal["leave", "drain"]  # wants to stop, or shall stay without experts


@dataclass
class Member:
    """Of an expert worker: `wish` is what it shall hold, `told` the last Assign (None: none yet).

    `holds` is what it has for certain: its last report, less what it was told since to drop, for a
    report may have been on its way. `exit`: it hands over, until `released`.
    """

    info: WorkerInfo
    holds: set[ExpertKey]
    wish: set[ExpertKey]
    told: set[ExpertKey] | None = None
    exit: Exit | None = None
    released: bool = False
    _dropped: dict[ExpertKey, int] = field(default_factory=dict)  # epoch of the Assign without it

    @property
    def published(self) -> set[ExpertKey]:
        return self.holds & self.wish

    @property
    def rests(self) -> bool:
        """It has what it shall have."""
        return self.holds == self.wish

    @property
    def hands_over(self) -> bool:
        return self.exit is not None and not self.released

    def report(self, experts: Iterable[ExpertKey], epoch: int) -> None:
        """It holds these, after the Assign of this epoch."""
        self._dropped = {key: told for key, told in self._dropped.items() if told > epoch}
        self.holds = {key for key in experts if key not in self._dropped}

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

    def release(self) -> None:
        """It is no holder any more, though one that stops keeps its experts while it lasts."""
        self.released = True
        self.wish = set()
        if self.exit == "leave":
            self.holds, self.told = set(), self.wish
