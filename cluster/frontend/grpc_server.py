"""The methods of shoal.v1.Inference and grpc.health.v1.Health over one InferenceService.

Ray Serve's gRPC proxy calls a deployment's method by the name of the RPC with the keyword
`grpc_context`, and carries status and trailing metadata back only along with a message. So nothing
is raised here: a failing unary call sets its status and returns an empty message (which gRPC drops)
and a failing stream ends with an `error` event.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2 as health

from cluster.errors import InternalError, NotFound, RequestTooLarge, ShoalError, quote
from cluster.frontend.expert_load import ExpertLoad, LoadWatch
from cluster.frontend.generation import Generation
from cluster.frontend.grpc_errors import REQUEST_ID_KEY, GrpcContext, set_error
from cluster.frontend.grpc_messages import (
    chat_body,
    completion_body,
    delta_message,
    detokenize_body,
    timing_message,
    tokenize_body,
    usage_message,
)
from cluster.frontend.idempotency import HEADER as IDEMPOTENCY_HEADER
from cluster.frontend.idempotency import IdempotentCall, idempotent_call
from cluster.frontend.observation import Observation
from cluster.frontend.observer import Origin
from cluster.frontend.openai import SamplingFields
from cluster.frontend.request_context import begin_request, key_name
from cluster.frontend.service import InferenceService
from cluster.protos import inference_pb2 as pb

logger = logging.getLogger(__name__)
ReplyT = TypeVar("ReplyT", bound=Message)
HEALTH_SERVICES = ("", "shoal.v1.Inference")
HEALTH_POLL_S = 1.0
HEALTH_WATCH_S = 30.0
"""As WATCH_S of expert_load.py, but longer: clients may pause their calls until the next one."""
IDEMPOTENCY_KEY = IDEMPOTENCY_HEADER.lower()


class InferenceMethods:
    """shoal.v1.Inference. A mixin: the class that inherits it sets `service` and `loads`."""

    service: InferenceService
    loads: LoadWatch

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: GrpcContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Continue a text or token ids."""

        async def start(observation: Observation) -> Generation:
            body = completion_body(request)
            call = self._call(grpc_context, body)
            return await self.service.complete(body, call=call, observation=observation)

        async with aclosing(
            self._stream(request, grpc_context, pb.GenerateResponse, start)
        ) as events:
            async for event in events:
                yield event

    async def Chat(
        self, request: pb.ChatRequest, grpc_context: GrpcContext
    ) -> AsyncIterator[pb.ChatResponse]:
        """Answer a conversation."""

        async def start(observation: Observation) -> Generation:
            body = chat_body(request)
            call = self._call(grpc_context, body)
            return await self.service.chat(body, call=call, observation=observation)

        async with aclosing(self._stream(request, grpc_context, pb.ChatResponse, start)) as events:
            async for event in events:
                yield event

    async def Tokenize(
        self, request: pb.TokenizeRequest, grpc_context: GrpcContext
    ) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""

        async def reply() -> pb.TokenizeResponse:
            ids = await self.service.tokenize(tokenize_body(request))
            context = self.service.model.context_tokens
            return pb.TokenizeResponse(token_ids=ids, max_model_len=context)

        return await self._unary(request, grpc_context, pb.TokenizeResponse, reply)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, grpc_context: GrpcContext
    ) -> pb.DetokenizeResponse:
        """Text of token ids."""

        async def reply() -> pb.DetokenizeResponse:
            return pb.DetokenizeResponse(text=self.service.detokenize(detokenize_body(request)))

        return await self._unary(request, grpc_context, pb.DetokenizeResponse, reply)

    async def WatchLoad(
        self, request: pb.WatchLoadRequest, grpc_context: GrpcContext
    ) -> AsyncIterator[pb.ExpertLoad]:
        """What every expert computed lately, now and every `interval_s` seconds, for a while."""
        request_id = self._begin(grpc_context)
        interval_s = request.interval_s if request.HasField("interval_s") else None
        try:
            self._authorize(grpc_context, request_id)
            async with aclosing(self.loads.watch(interval_s)) as watch:
                async for load in watch:
                    yield await _message(load)
        except Exception as error:
            told = set_error(grpc_context, _known(error, request_id), request_id)
            yield pb.ExpertLoad(error=told)

    async def _stream(
        self,
        request: Message,
        context: GrpcContext,
        response: Callable[..., ReplyT],
        start: Callable[[Observation], Awaitable[Generation]],
    ) -> AsyncGenerator[ReplyT, None]:
        request_id = self._begin(context)
        try:
            self._authorize(context, request_id)
            with self.service.observe(self._origin(context, request_id)) as observation:
                self._check_size(request)
                generation = await start(observation)
            with generation:
                common = self._common(generation)
                async for delta in generation:
                    yield response(
                        **common, delta=delta_message(delta), renormalised=delta.renormalised
                    )
                last = response(
                    **common,
                    usage=usage_message(generation.usage),
                    renormalised=generation.renormalised,
                    timing=timing_message(generation),
                )
            yield last
        except Exception as error:
            yield response(error=set_error(context, _known(error, request_id), request_id))

    async def _unary(
        self,
        request: Message,
        context: GrpcContext,
        response: Callable[[], ReplyT],
        reply: Callable[[], Awaitable[ReplyT]],
    ) -> ReplyT:
        request_id = self._begin(context)
        try:
            self._authorize(context, request_id)
            self._check_size(request)
            return await reply()
        except Exception as error:
            set_error(context, _known(error, request_id), request_id)
            return response()

    def _begin(self, context: GrpcContext) -> str:
        """The request's id, which every answer carries."""
        metadata = dict(context.invocation_metadata() or ())
        given = str(metadata.get(REQUEST_ID_KEY, ""))
        request_id = begin_request(given, self.service.limits.max_request_id_chars)
        context.set_trailing_metadata([(REQUEST_ID_KEY, request_id)])
        return request_id

    def _origin(self, context: GrpcContext, request_id: str) -> Origin:
        metadata = context.invocation_metadata() or ()
        traceparents, states = (
            [str(value) for key, value in metadata if key == name]
            for name in ("traceparent", "tracestate")
        )
        traceparent = traceparents[0] if len(traceparents) == 1 else ""
        return Origin(request_id, "grpc", key_name.get(), traceparent, ",".join(states))

    def _authorize(self, context: GrpcContext, request_id: str) -> None:
        try:
            self.service.authorizer.check_grpc(context.invocation_metadata())
        except ShoalError as error:
            self.service.on_refused(request_id, error.code)
            raise

    def _call(self, context: GrpcContext, body: SamplingFields) -> IdempotentCall | None:
        key = dict(context.invocation_metadata() or ()).get(IDEMPOTENCY_KEY)
        given = None if key is None else str(key)
        return idempotent_call(key_name.get(), given, body, self.service.limits)

    def _check_size(self, request: Message) -> None:
        limit = self.service.limits.max_body_bytes
        if request.ByteSize() > limit:
            raise RequestTooLarge(f"The message is larger than {limit} bytes.")

    def _common(self, generation: Generation) -> dict[str, Any]:
        request = generation.request
        return {
            "id": request.request_id,
            "model": request.model,
            "created": request.created,
            "system_fingerprint": self.service.system_fingerprint or "",
        }


class HealthMethods:
    """grpc.health.v1.Health: SERVING when requests are served. A mixin like InferenceMethods."""

    service: InferenceService

    async def Check(
        self, request: health.HealthCheckRequest, grpc_context: GrpcContext
    ) -> health.HealthCheckResponse:
        """State now; NOT_FOUND for a service this server does not have."""
        if request.service not in HEALTH_SERVICES:
            error = NotFound(f"Unknown service: {quote(request.service)}.", code="unknown_service")
            set_error(grpc_context, error, uuid.uuid4().hex)
            return health.HealthCheckResponse()
        return health.HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self, request: health.HealthCheckRequest, grpc_context: GrpcContext
    ) -> AsyncIterator[health.HealthCheckResponse]:
        """State now and after every change, for HEALTH_WATCH_S or until the server drains: clients
        watch again by themselves."""
        last, ends_s, is_told = None, time.monotonic() + HEALTH_WATCH_S, False
        while time.monotonic() < ends_s and not is_told:
            is_told = self.service.is_draining
            status = self._status(request.service)
            if status != last:
                yield health.HealthCheckResponse(status=status)
            last = status
            await asyncio.sleep(HEALTH_POLL_S)

    async def List(
        self, request: health.HealthListRequest, grpc_context: GrpcContext
    ) -> health.HealthListResponse:
        """State of every service."""
        states = {
            name: health.HealthCheckResponse(status=self._status(name)) for name in HEALTH_SERVICES
        }
        return health.HealthListResponse(statuses=states)

    def _status(self, name: str) -> Any:
        states = health.HealthCheckResponse
        if name not in HEALTH_SERVICES:
            return states.SERVICE_UNKNOWN
        return states.SERVING if self.service.readiness().ready else states.NOT_SERVING


class GrpcMethods(InferenceMethods, HealthMethods):
    """Everything the ingress answers over gRPC."""


async def _message(load: ExpertLoad) -> pb.ExpertLoad:
    """Made in a thread, once for all who watch the same load."""
    return await asyncio.to_thread(lambda: load.message)


def _known(error: Exception, request_id: str) -> ShoalError:
    """The error itself if it is ours; another one is logged and stays inside."""
    if isinstance(error, ShoalError):
        return error
    logger.error("request %s failed", request_id, exc_info=error)
    return InternalError("The server failed; its log has the details.")
