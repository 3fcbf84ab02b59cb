"""Commands that change the cluster: move, replicate and rebalance experts, scale tiers, chaos.

A command is checked here as far as the newest snapshot tells; the directory decides and answers
with one line for people. Only apps that are built with `Operations` have these routes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from ipaddress import ip_address
from typing import Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from cluster.errors import InvalidRequest, NotFound, PermissionDenied, Unavailable, quote
from cluster.frontend.api_docs import body_of
from cluster.frontend.checks import check_number
from cluster.frontend.http_guard import json_response
from cluster.frontend.json_body import read_json
from cluster.frontend.schema_errors import SchemaT, parse_body
from cluster.limits import Limits
from experts.messages import (
    MAX_WORKERS,
    Chaos,
    ChaosRole,
    Command,
    CommandRefused,
    Drain,
    Rebalance,
    Replicate,
    Scale,
    Snapshot,
)

logger = logging.getLogger(__name__)

MAX_STOP_S = 3600.0
MAX_IDS_NAMED = 16
_RETRY_S = 1
_ROLES: dict[str, ChaosRole] = {
    "expert": "experts",
    "router": "router",
    "attention": "attention",
}
"""One worker of a role, as the API calls it: the role."""


class _Body(BaseModel):
    """Strict; a field that nobody knows is refused: a mistyped command must not half work."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class DrainBody(_Body):
    """Body of POST /v1/experts/drain."""

    worker: str


class ReplicateBody(_Body):
    """Body of POST /v1/experts/replicate."""

    layer: int
    expert: int
    replicas: int


class RebalanceBody(_Body):
    """Body of POST /v1/experts/rebalance: {}."""


class ScaleBody(_Body):
    """Body of POST /v1/scale; `workers` null: back to the tier's policy."""

    tier: Literal["experts", "attention"]
    workers: int | None


class ChaosBody(_Body):
    """Body of POST /v1/chaos; `worker` null: any one of the role. `for_s`: length of a stop."""

    action: Literal["kill", "stop"]
    role: Literal["expert", "router", "attention"]
    worker: str | None = None
    for_s: float = 30.0


BODIES = (DrainBody, ReplicateBody, RebalanceBody, ScaleBody, ChaosBody)


class Operations:
    """Turns checked bodies into commands for the directory. Every method returns its one line.

    Raises InvalidRequest, NotFound (no such worker) or Unavailable (no directory).
    """

    def __init__(
        self, command: Callable[[Command], str], snapshot: Callable[[], Snapshot | None]
    ) -> None:
        """`command` blocks, for seconds at most, and raises CommandRefused or OSError."""
        self._command = command
        self._snapshot = snapshot

    async def drain(self, body: DrainBody) -> str:
        """Hand over all experts of a worker."""
        self._check_worker(body.worker, "expert")
        return await self._run(Drain(worker_id=body.worker))

    async def replicate(self, body: ReplicateBody) -> str:
        """Keep at least so many holders of an expert."""
        layers = self._known().holders
        if str(body.layer) not in layers:
            raise InvalidRequest(
                f"Invalid 'layer': {quote(body.layer)} has no experts; layers that have:"
                f" {_ids(layers)}.",
                param="layer",
            )
        check_number("expert", body.expert, 0, len(layers[str(body.layer)]) - 1)
        check_number("replicas", body.replicas, 1, MAX_WORKERS)
        return await self._run(
            Replicate(layer=body.layer, expert=body.expert, replicas=body.replicas)
        )

    async def rebalance(self, body: RebalanceBody) -> str:
        """One placement step now."""
        return await self._run(Rebalance())

    async def scale(self, body: ScaleBody) -> str:
        """Set how many workers a tier shall have; they come and go after the answer."""
        if body.workers is not None:
            check_number("workers", body.workers, 1, MAX_WORKERS)
        return await self._run(Scale(role=body.tier, workers=body.workers))

    async def chaos(self, body: ChaosBody) -> str:
        """Kill or stop a worker."""
        if body.worker is not None:
            self._check_worker(body.worker, body.role)
        check_number("for_s", body.for_s, 0, MAX_STOP_S, above_low=True)
        role, seconds = _ROLES[body.role], body.for_s
        return await self._run(
            Chaos(action=body.action, role=role, worker_id=body.worker, duration_s=seconds)
        )

    def _known(self) -> Snapshot:
        snapshot = self._snapshot()
        if snapshot is None:
            raise _no_directory("there is no line to it yet")
        return snapshot

    def _check_worker(self, worker_id: str, kind: str) -> None:
        ids = [worker.worker_id for worker in self._known().workers_of(_ROLES[kind])]
        if worker_id not in ids:
            raise NotFound(
                f"There is no {kind} worker {quote(worker_id)}; there are: {_ids(ids)}.",
                param="worker",
                code="worker_not_found",
            )

    async def _run(self, command: Command) -> str:
        logger.info("command: %r", command)
        try:
            return await asyncio.to_thread(self._command, command)
        except CommandRefused as error:
            raise InvalidRequest(str(error), code="refused") from None
        except OSError as error:
            raise _no_directory(str(error)) from None


def add_operations(
    app: FastAPI, operations: Operations, limits: Limits, *, under_any_name: bool
) -> None:
    """The routes. Each answers {"done": "<one line>"}.

    `under_any_name`: whatever the Host header is, which is safe where commands need an API key.
    """
    answer = partial(_answer, limits=limits, under_any_name=under_any_name)

    @app.post("/v1/experts/drain", openapi_extra=body_of(DrainBody))
    async def drain(request: Request) -> Response:
        """Hand over all experts of a worker; it stays without experts."""
        return await answer(request, DrainBody, operations.drain)

    @app.post("/v1/experts/replicate", openapi_extra=body_of(ReplicateBody))
    async def replicate(request: Request) -> Response:
        """Keep at least so many holders of an expert; 1: no longer more than needed."""
        return await answer(request, ReplicateBody, operations.replicate)

    @app.post("/v1/experts/rebalance", openapi_extra=body_of(RebalanceBody))
    async def rebalance(request: Request) -> Response:
        """Move replicas to where the load is, one step now."""
        return await answer(request, RebalanceBody, operations.rebalance)

    @app.post("/v1/scale", openapi_extra=body_of(ScaleBody))
    async def scale(request: Request) -> Response:
        """Set how many workers a tier shall have; answered before they are there."""
        return await answer(request, ScaleBody, operations.scale)

    @app.post("/v1/chaos", openapi_extra=body_of(ChaosBody))
    async def chaos(request: Request) -> Response:
        """Kill or stop a worker, if the server was started with chaos enabled."""
        return await answer(request, ChaosBody, operations.chaos)


async def _answer(
    request: Request,
    schema: type[SchemaT],
    run: Callable[[SchemaT], Awaitable[str]],
    limits: Limits,
    under_any_name: bool,
) -> Response:
    if not under_any_name:
        _check_host(request.headers.get("host", ""))
    body = parse_body(schema, await read_json(request, limits))
    return json_response({"done": await run(body)})


def _check_host(host: str) -> None:
    """A page of the web may have its own name resolve to this machine and then post here, but it
    cannot have our address or localhost for its name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith((".svc", ".svc.cluster.local")):
            return
        ip_address(name)
    except ValueError:
        raise PermissionDenied(
            "Commands are taken under an address, localhost or a cluster's service name, not"
            f" {quote(host)}."
        ) from None


def _ids(names: Iterable[str]) -> str:
    """Names for a message, not too many."""
    found = list(names)
    more = f" and {len(found) - MAX_IDS_NAMED} more" if len(found) > MAX_IDS_NAMED else ""
    return (", ".join(found[:MAX_IDS_NAMED]) or "none") + more


def _no_directory(reason: str) -> Unavailable:
    return Unavailable(
        f"The directory did not answer ({reason}); the command may not have been carried out.",
        code="directory_unreachable",
        retry_after_s=_RETRY_S,
    )
