"""The state of a micro-batch between begin and finish: what is answered, under way, with nobody.

An exchange is done when every (token, expert) pair has been answered once. `lane.py` drives it.
"""

import math
import operator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from experts.hop import Fault, Hop
from router.combine import renormalise
from router.compute import RouterCompute
from router.dispatch import Int64s, Pairs
from router.errors import ExpertsFailed, ExpertsUnavailable
from router.table import RoutingTable
from router.times import Wait

NO_PAIRS: Int64s = np.empty(0, np.int64)
_BROKEN = frozenset({Fault.FAILED, Fault.NOT_FINITE})  # by the rows or by the weights
_ORDER = operator.attrgetter("worker_id", "attempt")


@dataclass(slots=True, eq=False)
class Answer:
    """Rows of one worker for the rows and pairs of the exchange at these indices."""

    worker_id: str
    attempt: int
    row_index: Int64s
    pair_index: Int64s
    rows: Tensor


@dataclass(slots=True, eq=False)
class OpenHop:
    """A hop that is not answered, with the rows and pairs of the exchange that it carries."""

    hop: Hop
    row_index: Int64s
    pair_index: Int64s

    def answer(self) -> Answer:
        """What came back; only for a hop with a reply."""
        hop, rows = self.hop, None if self.hop.reply is None else self.hop.reply.rows
        if rows is None:
            raise RuntimeError("a hop without rows is no answer")
        return Answer(hop.worker_id, hop.frame.attempt, self.row_index, self.pair_index, rows)


@dataclass(slots=True, eq=False)
class Exchange:
    """Up to `max_batch_rows` rows of one layer. Times are on the lane's clock."""

    layer: int
    x: Tensor  # [T, d]
    pairs: Pairs  # all T * k; pair p is row p // k, those of a row by expert id
    begun_s: float
    deadline_s: float
    todo: Int64s = field(default_factory=NO_PAIRS.copy)  # pairs that are with nobody, ascending
    open: list[OpenHop] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    dropped: Int64s = field(default_factory=NO_PAIRS.copy)  # pairs given up
    renormalised: Int64s = field(default_factory=NO_PAIRS.copy)  # rows that `combine` scaled
    expert_us: int = 0  # that expert workers computed for the answers
    longest: Wait | None = None  # for an answer, while hops are logged
    attempt: int = 0
    generation: int = -1  # of the table that was last looked at for it
    planned_s: float = 0.0  # when holders were last chosen
    lacking_since_s: float = math.inf  # when the outage that it waits through began
    denied: set[tuple[str, int]] = field(default_factory=set)  # (worker, expert it lacks)
    suspects: dict[str, str] = field(default_factory=dict)  # worker that failed on it -> why

    def take(self, item: OpenHop, is_logged: bool) -> None:
        """Keep the answer of a hop."""
        answer, reply = item.answer(), item.hop.reply
        self.answers.append(answer)
        if reply is not None:
            self.expert_us += reply.expert_us
            if is_logged:
                wait = Wait.of(item.hop.worker_id, reply, item.hop.took_s)
                if self.longest is None or wait.took_s > self.longest.took_s:
                    self.longest = wait

    def note_fault(self, hop: Hop) -> None:
        """Remember what a failed hop says about its worker, for this exchange only."""
        if hop.fault in _BROKEN:
            self.suspects[hop.worker_id] = f"{hop.fault.value}: {hop.detail}"
        self.denied.update((hop.worker_id, expert) for expert in hop.missing)

    def drop_todo(self) -> None:
        """Give up the pairs that are with nobody."""
        self.dropped = np.concatenate([self.dropped, self.todo])
        self.todo = NO_PAIRS

    def combine(self, compute: RouterCompute, deterministic: bool) -> Tensor:
        """All answers as [T, d] float32, where x lies; sets `renormalised`.

        The answers go at once: memory of a ring is given back on the stream that has read it."""
        if deterministic:
            by_pair = [(a.pair_index, a.rows) for a in self.answers]
            total = compute.sum_by_expert(self.x, by_pair)
        else:
            by_row = [(a.row_index, a.rows) for a in sorted(self.answers, key=_ORDER)]
            total = compute.sum_by_worker(self.x, by_row)
        self.answers.clear()
        if self.dropped.size:
            rows, scales = renormalise(self.x.shape[0], self.pairs.weights, self.dropped)
            compute.scale_rows(total, rows, scales)
            self.renormalised = rows
        return total

    def unavailable(self, now_s: float, worker_id: str = "") -> ExpertsUnavailable:
        """The error at the deadline; worker_id is one that does not answer."""
        index = [self.todo, *(item.pair_index for item in self.open)]
        experts = np.unique(self.pairs.experts[np.concatenate(index)]).tolist()
        detail = f"{worker_id} does not answer" if worker_id else ""
        return ExpertsUnavailable(self.layer, experts, now_s - self.begun_s, detail)

    def check_for_failure(self, table: RoutingTable, now_s: float) -> None:
        """Raise ExpertsFailed when all holders of an expert failed on these rows."""
        if not self.suspects:
            return
        holders = table.holders(self.layer)
        for expert in np.unique(self.pairs.experts[self.todo]).tolist():
            ids = [table.worker_ids[w] for w in holders[expert].tolist() if w >= 0]
            if ids and all(worker_id in self.suspects for worker_id in ids):
                why = self.suspects[ids[0]]
                raise ExpertsFailed(self.layer, [expert], now_s - self.begun_s, why)


@dataclass(slots=True, eq=False)
class Pending:
    """A micro-batch between begin and finish: one exchange, more if it has too many rows."""

    shape: tuple[int, int]
    device: torch.device
    exchanges: list[Exchange]

    @property
    def expert_us(self) -> int:
        """What expert workers computed for it; complete after `finish`."""
        return sum(exchange.expert_us for exchange in self.exchanges)

    @property
    def renormalised(self) -> list[int]:
        """Rows of the micro-batch that lack experts; complete after `finish`."""
        rows, start = [], 0
        for exchange in self.exchanges:
            rows += [start + row for row in exchange.renormalised.tolist()]
            start += exchange.x.shape[0]
        return rows


@dataclass(slots=True)
class ExchangeCounters:
    """Since the start of a lane. visits / tokens: how many workers a token reaches on average."""

    exchanges: int = 0
    tokens: int = 0
    pairs: int = 0
    visits: int = 0  # token rows sent
    resent_pairs: int = 0
    hedges: int = 0  # hops moved to other holders because they were slow
    waits: int = 0  # for a holder of an expert that nobody has
    renormalised_tokens: int = 0
    hop_s: float = 0.0  # in begin and finish
    expert_s: float = 0.0  # that expert workers computed
