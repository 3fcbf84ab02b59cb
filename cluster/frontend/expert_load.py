"""How many rows each expert computed lately, who holds it, and how even that is: read or watched.

HTTP: `GET /v1/experts/load`, and `GET /v1/experts/load/stream` as server-sent events.
gRPC: `WatchLoad` (grpc_server.py). A row is one token computed by one expert, so a batch of T
tokens counts T x k rows in each MoE layer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.responses import Response

from cluster.errors import (
    InternalError,
    InvalidRequest,
    ShoalError,
    Unavailable,
    error_body,
    quote,
)
from cluster.frontend.checks import check_number
from cluster.frontend.responses import Json
from cluster.frontend.streaming import EventStream, to_json
from cluster.limits import Limits
from experts.load import LayerBalance, layer_balance
from experts.messages import ClusterLoadReply, Snapshot

if TYPE_CHECKING:
    from cluster.protos import inference_pb2 as pb

logger = logging.getLogger(__name__)

MIN_INTERVAL_S = 0.2
MAX_INTERVAL_S = 60.0
DEFAULT_INTERVAL_S = 1.0
"""Workers report once a second: a shorter interval mostly repeats."""
WATCH_S = 10.0
"""Serve stops an ingress once nothing is open there, and does not tell those who watch."""
CLOSING_POLL_S = 0.1
_RETRY_S = 1


@dataclass(frozen=True)
class ExpertLoad:
    """The load of every expert at one moment, with the table of holders of `snapshot`."""

    model: str
    reply: ClusterLoadReply
    snapshot: Snapshot

    @property
    def epoch(self) -> int:
        """Of the table that holders and replicas are from."""
        return self.snapshot.epoch

    @cached_property
    def balance(self) -> list[LayerBalance]:
        """By position of the layer."""
        return layer_balance(self.reply.rows, [worker.rows for worker in self.reply.workers])

    def holders(self, position: int) -> Sequence[tuple[str, ...]]:
        """Worker ids by expert [E] of the layer at a position; () where none is known."""
        num_experts = len(self.reply.rows[position])
        known = self.snapshot.holders_of(self.reply.layers[position])[:num_experts]
        return (*known, *[()] * (num_experts - len(known)))

    def experts(self, position: int) -> Iterator[tuple[int, int, int, tuple[str, ...]]]:
        """(expert, rows, recent rows, worker ids of its holders) of the layer at a position."""
        rows, recent_rows = self.reply.rows[position], self.reply.recent_rows[position]
        yield from zip(range(len(rows)), rows, recent_rows, self.holders(position), strict=True)

    @cached_property
    def body(self) -> bytes:
        """As JSON. Layer by layer, so that the event loop gets its turn (V3: 15,000 experts)."""
        layers = b",".join(to_json(self._layer(i)) for i in range(len(self.reply.layers)))
        workers = [
            {"worker_id": w.worker_id, "rows": sum(w.rows), "recent_rows": sum(w.recent_rows)}
            for w in self.reply.workers
        ]
        head = to_json({**self._head, "workers": workers})
        return head[:-1] + b',"layers":[' + layers + b"]}"

    @cached_property
    def compact_body(self) -> bytes:
        """The same as matrices, for views that draw them; a holder is an index into `workers`.
        Layer by layer too."""
        layers = range(len(self.reply.layers))
        holders = [self.holders(i) for i in layers]
        present = (worker.worker_id for worker in self.reply.workers)
        known = (name for layer in holders for names in layer for name in names)
        index = {name: i for i, name in enumerate(dict.fromkeys(chain(present, known)))}
        matrices = {
            b"rows": self.reply.rows,
            b"recent_rows": self.reply.recent_rows,
            b"holders": ([[index[n] for n in names] for names in layer] for layer in holders),
        }
        head = {
            **self._head,
            "layers": self.reply.layers,
            "workers": list(index),
            "balancedness": [balance.workers for balance in self.balance],
            "expert_balancedness": [balance.experts for balance in self.balance],
        }
        parts = [
            b',"%s":[%s]' % (name, b",".join(map(to_json, rows))) for name, rows in matrices.items()
        ]
        return to_json(head)[:-1] + b"".join(parts) + b"}"

    @cached_property
    def message(self) -> pb.ExpertLoad:
        """As gRPC tells it."""
        from cluster.frontend.grpc_messages import load_message  # HTTP alone needs no protobuf

        return load_message(self)

    @property
    def _head(self) -> Json:
        return {
            "model": self.model,
            "epoch": self.epoch,
            "window_s": self.reply.window_s,
            "recent_s": self.reply.recent_s,
        }

    def _layer(self, position: int) -> Json:
        balance = self.balance[position]
        return {
            "layer": self.reply.layers[position],
            "balancedness": balance.workers,
            "expert_balancedness": balance.experts,
            "experts": [
                {
                    "expert": expert,
                    "rows": rows,
                    "recent_rows": recent_rows,
                    "replicas": len(holders),
                    "holders": holders,
                }
                for expert, rows, recent_rows, holders in self.experts(position)
            ],
        }


class LoadWatch:
    """Asks the directory for whoever reads or watches; all methods but `close` on one event loop.

    Those who ask within MIN_INTERVAL_S share an answer, so that any number of watchers costs the
    directory and this process no more than one.
    """

    def __init__(
        self,
        model: str,
        ask: Callable[[], ClusterLoadReply],
        snapshot: Callable[[], Snapshot | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask` blocks, for seconds at most, and raises OSError."""
        self._model = model
        self._ask = ask
        self._snapshot = snapshot
        self._clock = clock
        self._closing = threading.Event()
        self._newest: asyncio.Task[ExpertLoad] | None = None
        self._asked_s = -math.inf

    async def read(self) -> ExpertLoad:
        """The load now. Raises Unavailable."""
        if self._closing.is_set():
            raise Unavailable(
                "The server is shutting down.", code="draining", retry_after_s=_RETRY_S
            )
        if self._newest is None or self._is_stale(self._newest):
            self._asked_s = self._clock()
            self._newest = asyncio.create_task(asyncio.to_thread(self._read))
        return await asyncio.shield(self._newest)

    async def watch(self, interval_s: float | None) -> AsyncGenerator[ExpertLoad, None]:
        """The load now and every `interval_s` seconds, until `close`, for WATCH_S or one interval:
        who wants more watches again. Raises ShoalError."""
        seconds = DEFAULT_INTERVAL_S if interval_s is None else interval_s
        check_number("interval_s", float(seconds), MIN_INTERVAL_S, MAX_INTERVAL_S)
        ends_s = self._clock() + WATCH_S
        while True:
            due_s = self._clock() + seconds
            yield await self.read()
            while not self._closing.is_set() and (left_s := due_s - self._clock()) > 0:
                await asyncio.sleep(min(left_s, CLOSING_POLL_S))
            if self._closing.is_set() or self._clock() >= ends_s:
                return

    def close(self) -> None:
        """End every watch within CLOSING_POLL_S. From any thread."""
        self._closing.set()

    def _is_stale(self, newest: asyncio.Task[ExpertLoad]) -> bool:
        if not newest.done():
            return False
        failed = newest.cancelled() or newest.exception() is not None
        return failed or self._clock() - self._asked_s >= MIN_INTERVAL_S

    def _read(self) -> ExpertLoad:
        snapshot = self._snapshot()
        try:
            reply = self._ask()
        except OSError as error:
            logger.info("load of the experts: %s", error)
            snapshot = None
        if snapshot is None:
            raise Unavailable(
                "The directory cannot be reached: the load of the experts is not known.",
                code="directory_unreachable",
                retry_after_s=_RETRY_S,
            )
        return ExpertLoad(self._model, reply, snapshot)


def add_expert_load(app: FastAPI, loads: LoadWatch, limits: Limits) -> None:
    """The two routes."""

    @app.get("/v1/experts/load", openapi_extra={"parameters": [_COMPACT]})
    async def expert_load(request: Request) -> Response:
        """Rows of every expert within the window and recently, its replicas and holders; how even
        the layers are."""
        compact = _compact(request)
        body = await _body(await loads.read(), compact)
        return Response(body, media_type="application/json")

    @app.get("/v1/experts/load/stream", openapi_extra={"parameters": [_INTERVAL, _COMPACT]})
    async def expert_load_stream(request: Request) -> Response:
        """The same every `interval_s` seconds, as server-sent events. Ends with [DONE] after ten
        seconds, or one interval: ask again at once."""
        compact, watch = _compact(request), loads.watch(_interval(request))
        first = await anext(watch)  # what goes wrong now still gets its HTTP status
        return EventStream(_events(first, watch, compact), limits, "load of the experts")


async def _body(load: ExpertLoad, compact: bool) -> bytes:
    """Made in a thread, once for all who read the same load."""
    return await asyncio.to_thread(lambda: load.compact_body if compact else load.body)


_COMPACT = {
    "name": "compact",
    "in": "query",
    "required": False,
    "schema": {"type": "boolean", "default": False},
    "description": "Matrices [layer][expert] in place of one object for each expert.",
}
_INTERVAL = {
    "name": "interval_s",
    "in": "query",
    "required": False,
    "schema": {
        "type": "number",
        "minimum": MIN_INTERVAL_S,
        "maximum": MAX_INTERVAL_S,
        "default": DEFAULT_INTERVAL_S,
    },
}


def _interval(request: Request) -> float | None:
    given = request.query_params.get("interval_s")
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        raise InvalidRequest(
            f"Invalid 'interval_s': it should be a number of seconds, not {quote(given)}.",
            param="interval_s",
            code="invalid_type",
        ) from None


def _compact(request: Request) -> bool:
    given = request.query_params.get("compact", "false")
    if given not in ("true", "false"):
        raise InvalidRequest(
            f"Invalid 'compact': it should be true or false, not {quote(given)}.",
            param="compact",
            code="invalid_type",
        )
    return given == "true"


async def _events(
    first: ExpertLoad, watch: AsyncIterator[ExpertLoad], compact: bool
) -> AsyncIterator[bytes]:
    """An error ends the stream with an error event and without [DONE]."""
    try:
        yield _event(await _body(first, compact))
        async for load in watch:
            yield _event(await _body(load, compact))
    except ShoalError as error:
        yield _event(to_json(error_body(error)))
        return
    except Exception:
        logger.exception("the stream of the experts' load failed")
        yield _event(to_json(error_body(InternalError("The server failed."))))
        return
    yield b"data: [DONE]\n\n"


def _event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"
