"""One thread's way through a MoE layer: gate, dispatch, send, gather, retry, combine.

A pair whose worker died, hung, lacks the expert or failed goes to another holder; where there is
none, it waits for a newer snapshot or the end of a quarantine: losing a worker fails no request.
The deadline ends the wait, or the pair is given up if the settings say so (on_unavailable).
Resending is safe, an expert has no state.
"""

import math

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
from experts.client import ExpertClient
from experts.hop import Fault, Hop
from experts.snapshots import SnapshotBoard
from router.compute import RouterCompute
from router.config import RouterConfig
from router.dispatch import Int64s, Pairs, Plan, Share, plan_pairs
from router.exchange import Exchange, ExchangeCounters, OpenHop, Pending
from router.outage import Outage
from router.table import RoutingTable
from router.times import LayerHop


class Lane:
    """A thread's own connections to the experts; several micro-batches may be begun at a time."""

    def __init__(
        self,
        compute: RouterCompute,
        client: ExpertClient,
        board: SnapshotBoard,
        config: RouterConfig,
        limits: FrameLimits = DEFAULT_LIMITS,
        outage: Outage | None = None,
    ) -> None:
        """`outage` is shared by the lanes of a router."""
        self.counters = ExchangeCounters()
        self.client = client
        self.hop_log: list[LayerHop] | None = None
        """While it is a list every finished layer is noted there."""
        self._compute = compute
        self._board = board
        self._config = config
        self._outage = outage or Outage()
        self._health = client.health
        self._now = client.health.clock
        self._table = RoutingTable(-1, board.current[1], compute.spec.num_experts)
        self._max_rows = min(config.max_batch_rows, self._rows_per_frame(limits))
        self._flat_rows = np.repeat(np.arange(self._max_rows), compute.spec.top_k)

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Pending:
        """Gate x [T, d] float32 or bfloat16 and send it to the experts in that dtype; x must not
        change until `finish`. It may lie on the device that the router computes on.

        deadline_s: seconds from now, if that is less than the configured ones. Raises ValueError
        for a layer without experts or another width, NonFiniteInput.
        """
        compute = self._compute
        if layer not in compute.layers or x.ndim != 2 or x.shape[1] != compute.width:
            raise ValueError(
                f"layer {layer}, x {tuple(x.shape)}: expected a MoE layer and [T, {compute.width}]"
            )
        begun_s = self._now()
        limit_s = self._config.deadline_s
        until_s = begun_s + (limit_s if deadline_s is None else min(limit_s, deadline_s))
        routed = [(chunk, *compute.choose(layer, chunk)) for chunk in self._chunks(x)]
        pending = Pending((x.shape[0], x.shape[1]), x.device, [])
        for chunk, ids, weights in routed:
            pairs = Pairs(self._flat_rows[: ids.size], ids.reshape(-1), weights.reshape(-1))
            exchange = Exchange(layer, chunk, pairs, begun_s, until_s)
            pending.exchanges.append(exchange)
            self.counters.exchanges += 1
            self.counters.tokens += chunk.shape[0]
            self.counters.pairs += ids.size
            self._post(exchange, self._plan(exchange, pairs), None)
        self.counters.hop_s += self._now() - begun_s
        return pending

    def finish(self, pending: Pending) -> Tensor:
        """The weighted sum of the experts, [T, d] float32, in row order, where x lies.

        Raises ExpertsUnavailable at the deadline, ExpertsFailed when every holder failed.
        """
        begun_s = self._now()
        try:
            sums = [self._finish(exchange) for exchange in pending.exchanges]
        except BaseException:
            self.cancel(pending)
            raise
        finally:
            self._account(pending, begun_s)
        if len(sums) == 1:
            return sums[0]
        return torch.cat(sums) if sums else torch.zeros(pending.shape, device=pending.device)

    def _account(self, pending: Pending, begun_s: float) -> None:
        """What it took: the wait since begun_s, and the experts' time."""
        now_s, counters = self._now(), self.counters
        counters.hop_s += now_s - begun_s
        for exchange in pending.exchanges:
            counters.expert_s += exchange.expert_us * 1e-6
        if self.hop_log is not None:
            self._log_hop(self.hop_log, pending, now_s)

    def _log_hop(self, log: list[LayerHop], pending: Pending, now_s: float) -> None:
        exchanges = pending.exchanges
        if exchanges:  # of one layer, and begun together
            waits = (exchange.longest for exchange in exchanges)
            log.append(LayerHop.of(exchanges[0].layer, exchanges[0].begun_s, now_s, waits))

    def cancel(self, pending: Pending) -> None:
        """Give up what is still open; late answers are dropped."""
        for exchange in pending.exchanges:
            for item in exchange.open:
                self.client.abandon(item.hop)
            exchange.open.clear()

    # --- sending ---

    def _rows_per_frame(self, limits: FrameLimits) -> int:
        """Rows of which neither the batch nor its answer can exceed the limits of a frame."""
        top_k = self._compute.spec.top_k
        answer_rows = top_k if self._config.deterministic else 1
        bytes_per_row = 12 * top_k + 4 * self._compute.width * answer_rows
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

    def _plan(self, exchange: Exchange, pairs: Pairs, besides: str = "") -> Plan:
        """Choose workers for pairs of the exchange by the newest table, not the one `besides`."""
        table = self._newest_table(exchange)
        now_s, quarantine = self._now(), self._health.quarantine
        exchange.planned_s = now_s
        usable, load = table.everyone.copy(), table.nobody.copy()
        for i, worker_id in enumerate(table.worker_ids):
            load[i] = self._health.outstanding_rows(worker_id)
            if worker_id == besides or worker_id in exchange.suspects:
                usable[i] = False
            elif len(quarantine):
                usable[i] = not quarantine.is_out(worker_id, now_s)
        return plan_pairs(pairs, table.without(exchange.layer, exchange.denied), usable, load)

    def _newest_table(self, exchange: Exchange) -> RoutingTable:
        if self._table.generation != self._board.generation:
            generation, snapshot = self._board.current
            self._table = RoutingTable(generation, snapshot, self._compute.spec.num_experts)
            self._health.keep_only(self._table.worker_ids)
            self._end_outage()
        if exchange.generation != self._table.generation:
            exchange.generation = self._table.generation
            exchange.denied.clear()
        return self._table

    def _post(self, exchange: Exchange, plan: Plan, origin: Int64s | None) -> None:
        """Send the shares of a plan over the pairs at `origin` (None: over all of them)."""
        todo = [plan.unplaced if origin is None else origin[plan.unplaced]]
        picked = self._compute.pick(exchange.x, plan.shares, self._takes_device_rows)
        for share, rows in zip(plan.shares, picked, strict=True):
            index = share.pair_index if origin is None else origin[share.pair_index]
            worker_id = self._table.worker_ids[share.worker]
            if not self._health.quarantine.admits(worker_id, exchange.planned_s):
                todo.append(index)  # out meanwhile, or another lane probes it
                continue
            hop = self._hop(exchange, share, rows)
            self.client.post(hop)
            self.counters.visits += hop.num_rows
            exchange.open.append(OpenHop(hop, share.row_index, index))
        exchange.todo = todo[0] if len(todo) == 1 else np.sort(np.concatenate(todo))

    def _takes_device_rows(self, share: Share) -> bool:
        return self.client.takes_device_rows(self._table.worker_ids[share.worker])

    def _hop(self, exchange: Exchange, share: Share, rows: Tensor) -> Hop:
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
            self.client.gather([item.hop for item in exchange.open], exchange.generation)
            self._sort_hops(exchange)
            if exchange.todo.size:
                self._resend(exchange)
        for worker_id, why in exchange.suspects.items():  # others could do it: the fault is its own
            self._health.quarantine.punish(worker_id, self._now(), why)
        if not exchange.dropped.size and self._outage.lasts:
            self._newest_table(exchange)
            self._end_outage()
        total = exchange.combine(self._compute, self._config.deterministic)
        self.counters.renormalised_tokens += exchange.renormalised.size
        return total

    def _sort_hops(self, exchange: Exchange) -> None:
        """Answers to answers, pairs of failed hops back to todo; slow hops stay or move on."""
        hops, exchange.open = exchange.open, []
        members = self._newest_table(exchange).worker_ids
        slow: list[OpenHop] = []
        todo = [exchange.todo]
        for item in hops:
            if item.hop.reply is not None:
                exchange.take(item, self.hop_log is not None)
            elif item.hop.fault not in (None, Fault.TIMEOUT):
                exchange.note_fault(item.hop)
                todo.append(item.pair_index)
            elif item.hop.late or item.hop.worker_id not in members:
                slow.append(item)
            else:  # there is news, but not of this worker
                exchange.open.append(item)
        if len(todo) > 1:
            exchange.todo = np.sort(np.concatenate(todo))
        for i, item in enumerate(slow):
            if self._now() >= exchange.deadline_s:
                exchange.open += slow[i:]
                raise exchange.unavailable(self._now(), item.hop.worker_id)
            self._hedge(exchange, item)

    def _hedge(self, exchange: Exchange, item: OpenHop) -> None:
        """Move a slow hop to other holders if they have all of it, else go on waiting for it."""
        hop, todo = item.hop, exchange.todo
        plan = self._plan(exchange, exchange.pairs.take(item.pair_index), besides=hop.worker_id)
        if plan.unplaced.size and self._now() < self._give_up_s(exchange):
            if hop.fault is Fault.TIMEOUT:
                self.client.wait_again(hop)
            exchange.open.append(item)
            return
        self.client.abandon(hop)
        self.counters.hedges += 1
        self._post_again(exchange, plan, item.pair_index)
        exchange.todo = np.sort(np.concatenate([todo, exchange.todo]))

    def _give_up_s(self, exchange: Exchange) -> float:
        """When pairs without a holder are given up."""
        if self._config.on_unavailable == "wait":
            return math.inf
        since_s = self._outage.since(self._now())
        exchange.lacking_since_s = min(exchange.lacking_since_s, since_s)
        return exchange.lacking_since_s + self._config.expert_wait_s

    def _end_outage(self) -> None:
        """Unless an expert has no holder, or one that is left out may be its only one."""
        if self._outage.lasts and self._table.ready:
            self._health.keep_only(self._table.worker_ids)  # what left may have failed since
            if not len(self._health.quarantine):
                self._outage.end()

    def _resend(self, exchange: Exchange) -> None:
        """Try to place what is with nobody; wait for news if nothing else is under way."""
        if self._now() >= exchange.deadline_s:
            raise exchange.unavailable(self._now())
        todo = exchange.todo
        self._post_again(exchange, self._plan(exchange, exchange.pairs.take(todo)), todo)
        if exchange.todo.size and not exchange.open:
            exchange.check_for_failure(self._table, self._now())
            if self._now() < self._give_up_s(exchange):
                self._wait_for_holder(exchange)
            else:
                exchange.drop_todo()

    def _post_again(self, exchange: Exchange, plan: Plan, origin: Int64s) -> None:
        exchange.attempt += 1
        self.counters.resent_pairs += origin.size - plan.unplaced.size
        self._post(exchange, plan, origin)

    def _wait_for_holder(self, exchange: Exchange) -> None:
        """Wait for a newer snapshot, the end of a quarantine or time to doubt a NOT_HERE."""
        self.counters.waits += 1
        now_s, until_s = self._now(), min(exchange.deadline_s, self._give_up_s(exchange))
        release_s = self._health.quarantine.next_release_s(exchange.planned_s)
        if release_s is not None:
            until_s = min(until_s, release_s)
        if exchange.denied:
            until_s = min(until_s, now_s + self._config.stale_table_retry_s)
        if not self._board.wait_newer(exchange.generation, max(0.001, until_s - now_s)):
            exchange.denied.clear()
