"""The next snapshot from what the members hold. No I/O."""

from collections.abc import Mapping

from experts.directory.member import Member
from experts.messages import Snapshot, Targets
from experts.placement.space import ExpertSpace

Holders = dict[str, tuple[tuple[str, ...], ...]]


def holders_of(space: ExpertSpace, members: Mapping[str, Member]) -> Holders:
    """str(layer) -> holders of each expert [E], in the order of `members`."""
    lists: dict[int, list[list[str]]] = {
        layer: [[] for _ in range(space.num_experts)] for layer in space.moe_layers
    }
    for worker, member in members.items():
        for layer, expert in member.published:
            lists[layer][expert].append(worker)
    return {str(k): tuple([tuple(h) for h in layer]) for k, layer in lists.items()}


def num_held(holders: Holders) -> int:
    return sum(bool(workers) for layer in holders.values() for workers in layer)


class Seen:
    """The newest that any member was told, by this directory or the one before it."""

    def __init__(self) -> None:
        self.epoch = self.version = -1
        self.scale: Targets = {}
        self._scale_version = 0
        self._scale_is_ours = False

    def take(self, epoch: int, version: int, scale: Targets) -> None:
        """What a member has seen when it registers; version 0: nothing."""
        if not version:
            return
        self.epoch = max(self.epoch, epoch)
        self.version = max(self.version, version)
        if version > self._scale_version and not self._scale_is_ours:
            self.scale, self._scale_version = scale, version

    def set_scale(self, scale: Targets) -> None:
        """By command: no older one counts any more."""
        self.scale, self._scale_is_ours = scale, True

    def next(self, old: Snapshot, new: Snapshot) -> Snapshot:
        """The new one numbered above the old one and all that was seen; the old one if equal."""
        epoch = old.epoch + (new.holders != old.holders)
        if self.epoch >= old.epoch:
            epoch = self.epoch + 1
        numbers = {"version": old.version, "epoch": old.epoch}
        same = new.model_copy(update=numbers) == old
        if same and epoch == old.epoch and self.version < old.version:
            return old
        version = max(old.version, self.version) + 1
        return new.model_copy(update={"version": version, "epoch": epoch})
