"""The generating routes: a checked body becomes an answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response

from cluster.errors import InvalidRequest, quote
from cluster.frontend.api_docs import RENORMALISED_HEADER, TIMING_HEADER
from cluster.frontend.choice import Delta
from cluster.frontend.generation import Generation
from cluster.frontend.http_guard import json_response
from cluster.frontend.idempotency import HEADER as IDEMPOTENCY_KEY
from cluster.frontend.idempotency import IdempotentCall, idempotent_call
from cluster.frontend.json_body import read_json
from cluster.frontend.observation import Observation
from cluster.frontend.observer import Origin
from cluster.frontend.openai import ChatCompletionRequest, CompletionRequest, SamplingFields
from cluster.frontend.responses import CHAT, COMPLETION, Shape, timing_header, whole_answer
from cluster.frontend.schema_errors import SchemaT, parse_body
from cluster.frontend.service import InferenceService
from cluster.frontend.streaming import StreamResponse, next_delta, stream_events, unless_gone

MAX_IGNORED_NAMED = 16
KEPT_HEADER = {"Idempotency-Replayed": "true"}
"""Marks an answer that was given before."""

BodyT = TypeVar("BodyT", bound=SamplingFields)
Start = Callable[[BodyT, float | None, IdempotentCall | None, Observation], Awaitable[Generation]]


class GeneratingHandlers:
    """Answers generating requests, whole or as a stream."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatCompletionRequest, self._service.chat, CHAT)

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest, self._service.complete, COMPLETION)

    async def _read(self, request: Request, schema: type[SchemaT]) -> SchemaT:
        return parse_body(schema, await read_json(request, self._service.limits))

    async def _answer(
        self, request: Request, schema: type[BodyT], start: Start[BodyT], shape: Shape
    ) -> Response:
        with self._service.observe(_origin(request)) as observation:
            body = await self._read(request, schema)
            key = request.headers.get(IDEMPOTENCY_KEY)
            key_name = observation.origin.key_name
            call = idempotent_call(key_name, key, body, self._service.limits)
            kept = self._service.keys.find(call) if call else None
            if kept is not None:
                observation.kept()
                return Response(kept, media_type="application/json", headers=KEPT_HEADER)
            generation = await start(body, _timeout(request), call, observation)
        if generation.request.stream:
            return await self._stream(request, generation, shape)
        return await self._whole(request, generation, shape, call)

    async def _whole(
        self, request: Request, generation: Generation, shape: Shape, call: IdempotentCall | None
    ) -> Response:
        with generation:
            answer = whole_answer(generation, shape, self._service.system_fingerprint)
            found = await unless_gone(request, answer)
            headers = {**_headers_of(generation), TIMING_HEADER: timing_header(generation)}
            response = json_response(found, headers=headers)
            if call is not None:
                self._service.keys.keep(call, bytes(response.body))
        return response

    async def _stream(self, request: Request, generation: Generation, shape: Shape) -> Response:
        try:
            first = await self._first_delta(request, generation)
        except BaseException as error:
            generation.close(error)
            raise
        return StreamResponse(
            generation,
            first,
            stream_events(generation, first, shape, self._service.system_fingerprint),
            self._service.limits,
            _headers_of(generation),
        )

    async def _first_delta(
        self, request: Request, generation: Generation
    ) -> asyncio.Task[Delta | None]:
        """Wait a while for the first Delta: an error before it still gets its HTTP status."""
        first = asyncio.ensure_future(next_delta(generation))
        try:
            wait_s = self._service.limits.first_output_wait_s
            await unless_gone(request, asyncio.wait({first}, timeout=wait_s))
            if first.done():
                first.result()  # raises what went wrong
        except BaseException:
            first.cancel()
            raise
        return first


def _origin(request: Request) -> Origin:
    """HttpGuard has left the id of the request and the name of its key in the scope."""
    state = request.scope.get("state", {})
    traceparents = request.headers.getlist("traceparent")
    return Origin(
        request_id=state.get("request_id", ""),
        protocol="http",
        key_name=state.get("key_name", ""),
        traceparent=traceparents[0] if len(traceparents) == 1 else "",
        tracestate=",".join(request.headers.getlist("tracestate")),
    )


def _timeout(request: Request) -> float | None:
    """Seconds from the header X-Request-Timeout."""
    given = request.headers.get("x-request-timeout")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise InvalidRequest(
            f"The header X-Request-Timeout should be a number of seconds, not {quote(given)}.",
            param="timeout",
        )
    return seconds


def _headers_of(generation: Generation) -> dict[str, str]:
    """Which fields of the request nobody read, and whether experts were left out so far."""
    headers = {}
    names = generation.request.ignored
    if names:
        plain = ["".join(c for c in name[:64] if c.isascii() and c.isprintable()) for name in names]
        headers["X-Ignored-Params"] = ", ".join(plain[:MAX_IGNORED_NAMED])
    if generation.renormalised:
        headers[RENORMALISED_HEADER] = "true"
    return headers
