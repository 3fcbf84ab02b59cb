"""One thread's way through a MoE layer: gate, dispatch, send, gather, retry, combine.

An exchange is done when every (token, expert) pair has been answered once. A pair whose worker
died, hung, lacks the expert or failed goes to another holder; where there is none, it waits for a
newer snapshot or the end of a quarantine. Only the deadline ends the wait: losing a worker fails
no request. Resending is safe, an expert has no state.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from experts.channel.frame import (
    DEFAULT_LIMITS,
    ONE_ROW_PER_PAIR,
    Frame,
    FrameLimits,
    Kind,
)
from experts.client import ExpertClient, Fault, Hop
from experts.snapshots import SnapshotBoard
from router.combine import sum_by_expert, sum_by_worker
from router.config import RouterConfig
from router.dispatch import Int64s, Pairs, Plan, Share, plan_pairs
from router.errors import ExpertsFailed, ExpertsUnavailable
from router.gate import GateSpec, GateWeights, choose
from router.table import RoutingTable

_BROKEN = frozenset({Fault.FAILED, Fault.NOT_FINITE})  # by the rows or by the weights
_NONE = np.empty(0, np.int64)
_ORDER = operator.attrgetter("worker_id", "attempt")


@dataclass(slots=True)
class ExchangeCounters:
    """Since the start of a lane. visits / tokens: how many workers a token reaches on average."""

    exchanges: int = 0
    tokens: int = 0
    pairs: int = 0
    visits: int = 0  # token rows sent
    resent_pairs: int = 0
    waits: int = 0  # for a holder that nobody was


@dataclass(slots=True)
class _Answer:
    """Rows of one worker. In `sum` order: by worker id, then by attempt."""

    worker_id: str
    attempt: int
    row_index: Int64s
    pair_index: Int64s
    rows: Tensor


@dataclass(slots=True, eq=False)
class _Open:
    """A hop that is not answered, with the rows and pairs of the exchange that it carries."""

    hop: Hop
    row_index: Int64s
    pair_index: Int64s


@dataclass(slots=True, eq=False)
class Exchange:
    """The state of up to `max_batch_rows` rows of one layer."""

    layer: int
    x: Tensor  # [T, d]
    pairs: Pairs  # all T * k; pair p is row p // k
    begun_s: float
    deadline_s: float
    todo: Int64s  # pairs that are with nobody
    open: list[_Open] = field(default_factory=list)
    answers: list[_Answer] = field(default_factory=list)
    attempt: int = 0
    generation: int = -1
    denied: set[tuple[str, int]] = field(default_factory=set)  # (worker, expert it lacks)
    suspects: dict[str, str] = field(default_factory=dict)  # worker that failed on it -> why


@dataclass(slots=True, eq=False)
class Pending:
    """A micro-batch between begin and finish."""

    shape: tuple[int, int]
    exchanges: list[Exchange]


class Lane:
    """A thread's own connections to the experts; several micro-batches may be begun at a time."""

    def __init__(
        self,
        gates: Mapping[int, GateWeights],
        spec: GateSpec,
        client: ExpertClient,
        board: SnapshotBoard,
        config: RouterConfig,
        limits: FrameLimits = DEFAULT_LIMITS,
    ) -> None:
        self.counters = ExchangeCounters()
        self.client = client
        self._gates = gates
        self._spec = spec
        self._board = board
        self._config = config
        self._health = client.health
        self._table = RoutingTable(-1, board.current[1], spec.num_experts)
        self._width = next(iter(gates.values())).weight.shape[1]
        self._max_rows = min(config.max_batch_rows, self._rows_per_frame(limits))
        self._flat_rows = np.repeat(np.arange(self._max_rows), spec.top_k)

    def warm_up(self) -> None:
        """Compile the kernels now: the first token would wait some seconds for them."""
        layer, gate = next(iter(self._gates.items()))
        choose(torch.zeros(1, self._width), gate, self._spec)
        none = Pairs(_NONE, _NONE, _NONE.astype(np.float32))
        table = self._table
        plan_pairs(none, table.holders(layer), table.everyone, table.nobody)

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Pending:
        """Gate x [T, d] float32 and send it to the experts; x must not change until `finish`.

        deadline_s: seconds from now, None = the configured one. Raises ValueError for a layer
        without experts or another width, NonFiniteInput.
        """
        gate = self._gates.get(layer)
        if gate is None or x.ndim != 2 or x.shape[1] != self._width:
            raise ValueError(
                f"layer {layer}, x {tuple(x.shape)}: expected a MoE layer and [T, {self._width}]"
            )
        begun_s = self._health.clock()
        until_s = begun_s + (self._config.deadline_s if deadline_s is None else deadline_s)
        routed = [(chunk, *choose(chunk, gate, self._spec)) for chunk in self._chunks(x)]
        pending = Pending((x.shape[0], x.shape[1]), [])
        for chunk, ids, weights in routed:
            pairs = Pairs(self._flat_rows[: ids.size], ids.reshape(-1), weights.reshape(-1))
            exchange = Exchange(layer, chunk, pairs, begun_s, until_s, _NONE)
            pending.exchanges.append(exchange)
            self._count(chunk.shape[0], ids.size)
            self._post(exchange, self._plan(exchange, pairs), None)
        return pending

    def finish(self, pending: Pending) -> Tensor:
        """The weighted sum of the experts, [T, d] float32, in row order.

        Raises ExpertsUnavailable at the deadline, ExpertsFailed when every holder failed.
        """
        try:
            sums = [self._finish(exchange) for exchange in pending.exchanges]
        except BaseException:
            self.cancel(pending)
            raise
        if len(sums) == 1:
            return sums[0]
        return torch.cat(sums) if sums else torch.zeros(pending.shape)

    def cancel(self, pending: Pending) -> None:
        """Give up what is still open; late answers are dropped."""
        for exchange in pending.exchanges:
            for item in exchange.open:
                self.client.abandon(item.hop)
            exchange.open.clear()

    # --- sending ---

    def _rows_per_frame(self, limits: FrameLimits) -> int:
        """Rows of which neither the batch nor its answer can exceed the limits of a frame."""
        top_k = self._spec.top_k
        answer_rows = top_k if self._config.deterministic else 1
        bytes_per_row = 12 * top_k + 4 * self._width * answer_rows
        by_limit = (
            limits.max_payload_bytes // bytes_per_row,
            limits.max_rows // answer_rows,
            limits.max_pairs // top_k,
        )
        return max(1, min(by_limit))

    def _chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        if 0 < x.shape[0] <= self._max_rows:
            return (x.contiguous(),)
        starts = range(0, x.shape[0], self._max_rows)
        return tuple(x[start : start + self._max_rows].contiguous() for start in starts)

    def _count(self, num_tokens: int, num_pairs: int) -> None:
        self.counters.exchanges += 1
        self.counters.tokens += num_tokens
        self.counters.pairs += num_pairs

    def _plan(self, exchange: Exchange, pairs: Pairs, besides: str = "") -> Plan:
        """Choose workers for pairs of the exchange by the newest table, not the one `besides`."""
        if self._table.generation != self._board.generation:
            generation, snapshot = self._board.current
            self._table = RoutingTable(generation, snapshot, self._spec.num_experts)
        table = self._table
        if exchange.generation != table.generation:
            exchange.generation = table.generation
            exchange.denied.clear()
        now_s, quarantine = self._health.clock(), self._health.quarantine
        usable, load = table.everyone.copy(), table.nobody.copy()
        for i, worker_id in enumerate(table.worker_ids):
            load[i] = self._health.outstanding_rows(worker_id)
            if worker_id == besides or worker_id in exchange.suspects:
                usable[i] = False
            elif len(quarantine):
                usable[i] = quarantine.admits(worker_id, now_s)
        return plan_pairs(pairs, table.without(exchange.layer, exchange.denied), usable, load)

    def _post(self, exchange: Exchange, plan: Plan, origin: Int64s | None) -> None:
        """Send the shares of a plan over the pairs at `origin` (None: over all of them)."""
        for share in plan.shares:
            index = share.pair_index if origin is None else origin[share.pair_index]
            hop = self._hop(exchange, share)
            self.client.post(hop)
            self.counters.visits += hop.num_rows
            exchange.open.append(_Open(hop, share.row_index, index))
        left = plan.unplaced if origin is None else origin[plan.unplaced]
        exchange.todo = left

    def _hop(self, exchange: Exchange, share: Share) -> Hop:
        x, index = exchange.x, share.row_index
        rows = x if index.shape[0] == x.shape[0] else x.index_select(0, torch.from_numpy(index))
        frame = Frame(
            Kind.EXPERT_BATCH,
            attempt=exchange.attempt,
            layer=exchange.layer,
            epoch=self._table.epoch,
            flags=ONE_ROW_PER_PAIR if self._config.deterministic else 0,
            rows=rows,
            row_ids=torch.from_numpy(share.row_ids),
            expert_ids=torch.from_numpy(share.expert_ids),
            weights=torch.from_numpy(share.weights),
        )
        return Hop(self._table.worker_ids[share.worker], frame, exchange.deadline_s)

    # --- gathering ---

    def _finish(self, exchange: Exchange) -> Tensor:
        while exchange.open or exchange.todo.size:
            self.client.gather([item.hop for item in exchange.open])
            self._sort_hops(exchange)
            if exchange.todo.size:
                self._resend(exchange)
        for worker_id in exchange.suspects:  # others answered what it failed on: the fault is its
            self._health.quarantine.punish(worker_id, self._health.clock())
        return self._combine(exchange)

    def _sort_hops(self, exchange: Exchange) -> None:
        """Answers to answers, pairs of failed hops back to todo; slow hops stay or move on."""
        hops, exchange.open = exchange.open, []
        todo = [exchange.todo]
        for item in hops:
            if item.hop.reply is not None:
                exchange.answers.append(_answer(item))
            elif item.hop.fault is Fault.TIMEOUT:
                self._hedge(exchange, item)
            else:
                self._note_fault(exchange, item.hop)
                todo.append(item.pair_index)
        exchange.todo = np.sort(np.concatenate(todo)) if len(todo) > 1 else exchange.todo

    def _note_fault(self, exchange: Exchange, hop: Hop) -> None:
        if hop.fault in _BROKEN:
            exchange.suspects[hop.worker_id] = f"{hop.fault.value}: {hop.detail}"
        exchange.denied.update((hop.worker_id, expert) for expert in hop.missing)

    def _hedge(self, exchange: Exchange, item: _Open) -> None:
        """Move a slow hop to other holders if they have all of it, else go on waiting for it."""
        hop = item.hop
        if self._health.clock() >= exchange.deadline_s:
            exchange.open.append(item)
            raise self._unavailable(exchange, hop.worker_id)
        plan = self._plan(exchange, exchange.pairs.take(item.pair_index), besides=hop.worker_id)
        if plan.unplaced.size:
            self.client.wait_again(hop)
            exchange.open.append(item)
            return
        self.client.abandon(hop)
        self._health.quarantine.punish(hop.worker_id, self._health.clock())
        todo = exchange.todo
        self._resend_plan(exchange, plan, item.pair_index)
        exchange.todo = todo

    def _resend(self, exchange: Exchange) -> None:
        """Try to place what is with nobody; wait for news if nothing else is under way."""
        if self._health.clock() >= exchange.deadline_s:
            raise self._unavailable(exchange)
        plan = self._plan(exchange, exchange.pairs.take(exchange.todo))
        self._resend_plan(exchange, plan, exchange.todo)
        if exchange.todo.size and not exchange.open:
            self._wait_for_holder(exchange)

    def _resend_plan(self, exchange: Exchange, plan: Plan, origin: Int64s) -> None:
        exchange.attempt += 1
        self.counters.resent_pairs += origin.size - plan.unplaced.size
        self._post(exchange, plan, origin)

    def _wait_for_holder(self, exchange: Exchange) -> None:
        """Wait for a newer snapshot, the end of a quarantine or time to doubt a NOT_HERE."""
        self._check_for_failure(exchange)
        self.counters.waits += 1
        now_s = self._health.clock()
        until_s = exchange.deadline_s
        release_s = self._health.quarantine.next_release_s()
        if release_s is not None:
            until_s = min(until_s, release_s)
        if exchange.denied:
            until_s = min(until_s, now_s + self._config.stale_table_retry_s)
        if not self._board.wait_newer(exchange.generation, max(0.001, until_s - now_s)):
            exchange.denied.clear()

    def _check_for_failure(self, exchange: Exchange) -> None:
        """Raise ExpertsFailed when all holders of an expert failed on these rows."""
        if not exchange.suspects:
            return
        holders = self._table.holders(exchange.layer)
        for expert in np.unique(exchange.pairs.experts[exchange.todo]).tolist():
            ids = [self._table.worker_ids[w] for w in holders[expert].tolist() if w >= 0]
            if ids and all(worker_id in exchange.suspects for worker_id in ids):
                waited_s = self._health.clock() - exchange.begun_s
                raise ExpertsFailed(exchange.layer, [expert], waited_s, exchange.suspects[ids[0]])

    def _unavailable(self, exchange: Exchange, worker_id: str = "") -> ExpertsUnavailable:
        index = [exchange.todo, *(item.pair_index for item in exchange.open)]
        experts = np.unique(exchange.pairs.experts[np.concatenate(index)]).tolist()
        waited_s = self._health.clock() - exchange.begun_s
        detail = f"{worker_id} does not answer" if worker_id else ""
        return ExpertsUnavailable(exchange.layer, experts, waited_s, detail)

    def _combine(self, exchange: Exchange) -> Tensor:
        num_rows, width = exchange.x.shape
        if self._config.deterministic:
            by_pair = [(torch.from_numpy(a.pair_index), a.rows) for a in exchange.answers]
            return sum_by_expert((num_rows, width), self._spec.top_k, by_pair)
        ordered = sorted(exchange.answers, key=_ORDER)
        by_row = [
            (torch.from_numpy(a.row_index) if a.row_index.size < num_rows else None, a.rows)
            for a in ordered
        ]
        return sum_by_worker((num_rows, width), by_row)


def _answer(item: _Open) -> _Answer:
    hop = item.hop
    if hop.reply is None or hop.reply.rows is None:
        raise RuntimeError("the client accepted an answer without rows")
    attempt = hop.frame.attempt
    return _Answer(hop.worker_id, attempt, item.row_index, item.pair_index, hop.reply.rows)
