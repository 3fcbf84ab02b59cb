"""A generation as server-sent events, chunk by chunk as OpenAI's SDKs read them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from cluster.errors import InternalError, ShoalError, error_body
from cluster.frontend.choice import Delta
from cluster.frontend.generation import ClientGone, Generation
from cluster.frontend.responses import (
    CHAT,
    Json,
    Shape,
    chunk_choice,
    envelope,
    finish_choice,
    renormalised_json,
    role_choice,
    timing_json,
    usage_json,
)
from cluster.limits import Limits

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


class EventStream(EventSourceResponse):
    """Server-sent events that are kept alive; a client that takes none is dropped.

    `name` is for the log.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        limits: Limits,
        name: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            events,
            headers={"Cache-Control": "no-store", **(headers or {})},
            media_type="text/event-stream",
            ping=limits.ping_interval_s,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            sep="\n",
            send_timeout=limits.slow_client_s,
        )
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except TimeoutError:  # of send: the client reads nothing any more
            logger.info("%s: slow client dropped", self._name)


class StreamResponse(EventStream):
    """An event stream that closes its generation however it ends, even before it began."""

    def __init__(
        self,
        generation: Generation,
        first: asyncio.Task[Delta | None],
        events: AsyncIterator[bytes],
        limits: Limits,
        headers: dict[str, str],
    ) -> None:
        super().__init__(events, limits, f"request {generation.request.request_id}", headers)
        self._generation = generation
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._first.cancel()
            self._generation.close()


async def stream_events(
    generation: Generation,
    first: asyncio.Task[Delta | None],
    shape: Shape,
    fingerprint: str | None,
) -> AsyncIterator[bytes]:
    """Events of a whole answer. `first` is the task that waits for the first Delta.

    An error ends the stream with an error event and without [DONE].
    """
    writer = _ChunkWriter(generation, shape, fingerprint)
    try:
        for event in writer.opening():
            yield event
        delta = await first
        while delta is not None:
            for event in writer.events(delta):
                yield event
            delta = await next_delta(generation)
        if generation.request.include_usage or generation.request.timing:
            yield writer.closing_event()
    except ShoalError as error:
        yield to_event(error_body(error))
        return
    except Exception as error:
        generation.close(error)
        logger.exception("request %s failed in its stream", generation.request.request_id)
        yield to_event(error_body(InternalError("The server failed.")))
        return
    generation.close()  # before the client can know that this was all
    yield b"data: [DONE]\n\n"


async def next_delta(generation: Generation) -> Delta | None:
    """None: the generation is over."""
    return await anext(generation, None)


def to_event(data: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


def to_json(data: Any) -> bytes:
    """Compact UTF-8; never NaN."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


async def unless_gone(request: Request, work: Awaitable[ResultT]) -> ResultT:
    """The result of `work`. Raises ClientGone, having cancelled it, if the client leaves first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        gone.cancel()
        task.cancel()


async def _until_gone(request: Request) -> None:
    """Return when the connection is closed; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _ChunkWriter:
    """Makes the chunks of one stream; all have the same id, time and model."""

    def __init__(self, generation: Generation, shape: Shape, fingerprint: str | None) -> None:
        self._generation = generation
        self._request = generation.request
        self._shape = shape
        self._envelope = envelope(self._request, shape.chunk, fingerprint)

    def opening(self) -> list[bytes]:
        """The role of every chat choice."""
        if self._shape is not CHAT:
            return []
        return [self._event([role_choice(i)]) for i in range(self._request.num_sequences)]

    def events(self, delta: Delta) -> list[bytes]:
        """Text, if there is some, and the end, if it is reached.

        That experts were left out stands where it happened and once more at every end.
        """
        events = []
        if delta.text or delta.logprobs or (delta.token_ids and self._request.return_token_ids):
            choice = chunk_choice(delta, self._request, self._shape)
            events.append(self._event([choice], delta.renormalised))
        if delta.finish_reason is not None:
            choice = finish_choice(delta, self._shape)
            events.append(self._event([choice], self._generation.renormalised))
        return events

    def closing_event(self) -> bytes:
        """The last chunk: no choices, only what was asked for of counts and times."""
        chunk: Json = {**self._envelope, "choices": []}
        if self._request.include_usage:
            chunk["usage"] = usage_json(self._generation.usage)
        told = renormalised_json(self._generation.renormalised)
        return to_event({**chunk, **told, **timing_json(self._generation)})

    def _event(self, choices: list[Json], renormalised: bool = False) -> bytes:
        chunk: Json = {**self._envelope, "choices": choices, **renormalised_json(renormalised)}
        if self._request.include_usage:
            counts = self._request.continuous_usage
            chunk["usage"] = usage_json(self._generation.usage) if counts else None
        return to_event(chunk)
