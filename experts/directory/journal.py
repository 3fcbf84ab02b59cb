"""What happens to the pool, for people: one line an event, none for a load."""

import logging

from experts.directory.member import Member

logger = logging.getLogger(__name__)


class Journal:
    """`covered`: when experts lost their last holder, and when all have one again."""

    def __init__(self) -> None:
        self._was_covered = False
        self._orphaned_since_s: float | None = None

    def joined(self, member: Member) -> None:
        info = member.info
        if info.role != "experts":
            logger.info("%s worker %s joined", info.role, info.worker_id)
            return
        logger.info(
            "experts worker %s joined: %d slots, %d spare, holds %d experts%s",
            info.worker_id,
            info.num_slots,
            info.spare_slots,
            len(member.holds),
            ", is drained" if member.exit == "drain" else "",
        )

    def gone(self, member: Member, how: str) -> None:
        """`how`: what was seen of it, unless it had been released."""
        info = member.info
        if member.exit == "leave":
            how = "released" if member.released else f"{how} before it was released"
        held = f"; it held {len(member.published)} experts" if member.published else ""
        logger.info("%s worker %s left: %s%s", info.role, info.worker_id, how, held)

    def hands_over(self, member: Member) -> None:
        why = "asked to leave" if member.exit == "leave" else "is drained"
        logger.info(
            "experts worker %s %s: hands over %d experts, alone holds %d",
            member.info.worker_id,
            why,
            len(member.published),
            member.num_to_move,
        )

    def handed_over(self, member: Member, *, nobody_stays: bool) -> None:
        what = "nobody stays" if nobody_stays else f"{member.num_to_move} experts moved"
        logger.info("experts worker %s is not needed any more: %s", member.info.worker_id, what)

    def recalled(self, member: Member, shortage: str) -> None:
        name = member.info.worker_id
        logger.warning("experts worker %s, drained, is used again: the pool %s", name, shortage)

    def cannot_load(self, member: Member, num_experts: int, limit_s: float) -> None:
        name = member.info.worker_id
        logger.warning(
            "experts worker %s has not loaded %d experts in %g s: others shall, if they have room",
            name,
            num_experts,
            limit_s,
        )

    def covered(self, num_held: int, num_total: int, now_s: float) -> None:
        """After every change of the holders, once the experts are placed."""
        if num_held < num_total:
            if self._was_covered:
                self._orphaned_since_s = now_s
                logger.info("%d experts have no holder", num_total - num_held)
        elif self._orphaned_since_s is not None:
            after_s = now_s - self._orphaned_since_s
            self._orphaned_since_s = None
            logger.info("every expert has a holder again after %.2f s", after_s)
        self._was_covered = num_held >= num_total
