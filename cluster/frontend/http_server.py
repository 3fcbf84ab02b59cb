"""The OpenAI-compatible HTTP API over one InferenceService."""

from __future__ import annotations

import asyncio
import math
from importlib.metadata import version

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.errors import InvalidRequest, MethodNotAllowed, NotFound, ShoalError, quote
from cluster.frontend.api_docs import DocumentedApp, body_of
from cluster.frontend.choice import Delta
from cluster.frontend.expert_load import LoadWatch, add_expert_load
from cluster.frontend.generation import Generation
from cluster.frontend.http_guard import HttpGuard, error_response, json_response
from cluster.frontend.json_body import read_json
from cluster.frontend.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from cluster.frontend.responses import CHAT, COMPLETION, Json, Shape, whole_answer
from cluster.frontend.schema_errors import SchemaT, parse_body
from cluster.frontend.service import InferenceService
from cluster.frontend.streaming import StreamResponse, next_delta, stream_events, unless_gone

MAX_IGNORED_NAMED = 16


def build_app(
    service: InferenceService, loads: LoadWatch | None = None, *, echo_request_id: bool = True
) -> FastAPI:
    """All routes; those of the experts' load if `loads` is given.

    `echo_request_id=False` where a proxy in front already answers X-Request-Id, as Ray Serve's
    does.
    """
    app = DocumentedApp(
        title="Shoal",
        version=version("shoal-serve"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(HttpGuard, limits=lambda: service.limits, echo_request_id=echo_request_id)
    app.add_exception_handler(ShoalError, _on_shoal_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_generation(app, _Handlers(service))
    _add_tokens(app, service)
    _add_models(app, service)
    _add_state(app, service)
    if loads is not None:
        add_expert_load(app, loads, service.limits)
    return app


class _Handlers:
    """Answers generating requests, whole or as a stream."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        body = await self._read(request, ChatCompletionRequest)
        generation = await self._service.chat(body, _timeout(request))
        return await self._answer(request, generation, CHAT)

    async def completion(self, request: Request) -> Response:
        body = await self._read(request, CompletionRequest)
        generation = await self._service.complete(body, _timeout(request))
        return await self._answer(request, generation, COMPLETION)

    async def _read(self, request: Request, schema: type[SchemaT]) -> SchemaT:
        return parse_body(schema, await read_json(request, self._service.limits))

    async def _answer(self, request: Request, generation: Generation, shape: Shape) -> Response:
        if generation.request.stream:
            return await self._stream(request, generation, shape)
        try:
            answer = whole_answer(generation, shape, self._service.system_fingerprint)
            found = await unless_gone(request, answer)
            return json_response(found, headers=_ignored_header(generation.request.ignored))
        finally:
            generation.close()

    async def _stream(self, request: Request, generation: Generation, shape: Shape) -> Response:
        try:
            first = await self._first_delta(request, generation)
        except BaseException:
            generation.close()
            raise
        return StreamResponse(
            generation,
            first,
            stream_events(generation, first, shape, self._service.system_fingerprint),
            self._service.limits,
            _ignored_header(generation.request.ignored),
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


def _add_generation(app: FastAPI, handlers: _Handlers) -> None:
    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await handlers.chat(request)

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text or token ids."""
        return await handlers.completion(request)


def _add_tokens(app: FastAPI, service: InferenceService) -> None:
    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or a conversation."""
        body = parse_body(TokenizeRequest, await read_json(request, service.limits))
        ids = await service.tokenize(body)
        context = service.model.context_tokens
        return json_response({"count": len(ids), "max_model_len": context, "tokens": ids})

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""
        body = parse_body(DetokenizeRequest, await read_json(request, service.limits))
        return json_response({"prompt": service.detokenize(body)})


def _add_models(app: FastAPI, service: InferenceService) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """What this server serves."""
        found = [_model(service, name) for name in service.model.names]
        return json_response({"object": "list", "data": found})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One model."""
        service.check_model(name)
        return json_response(_model(service, name))


def _add_state(app: FastAPI, service: InferenceService) -> None:
    @app.get("/livez")
    async def livez() -> Response:
        """The process answers."""
        return json_response({"status": "ok"})

    @app.get("/health")
    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether requests are served: 200, or 503 with the stage of the start."""
        state = service.readiness()
        body = {
            "status": "ok" if state.ready else "loading",
            "stage": state.stage,
            "done": state.done,
            "total": state.total,
        }
        return json_response(body, 200 if state.ready else 503)

    @app.get("/version")
    async def server_version() -> Response:
        """Version of the server."""
        return json_response({"version": app.version})

    @app.get("/v1/limits")
    async def limits() -> Response:
        """What a request may be at most."""
        context = service.model.context_tokens
        return json_response({"max_context_tokens": context, **service.limits.as_dict()})


def _model(service: InferenceService, name: str) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": service.model.created,
        "owned_by": "shoal",
        "root": service.model.name,
        "max_model_len": service.model.context_tokens,
    }


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


def _ignored_header(names: tuple[str, ...]) -> dict[str, str]:
    """Tells the client which of its fields nobody read."""
    plain = ["".join(c for c in name[:64] if c.isascii() and c.isprintable()) for name in names]
    return {"X-Ignored-Params": ", ".join(plain[:MAX_IGNORED_NAMED])} if names else {}


async def _on_shoal_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ShoalError):
        raise error
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405 in OpenAI's shape."""
    what = f"{request.method[:16]} {request.url.path[:200]}"
    allow = (getattr(error, "headers", None) or {}).get("Allow")
    if allow:
        return error_response(MethodNotAllowed(f"Not allowed: {what}; only {allow}.", allow))
    return error_response(NotFound(f"Unknown request URL: {what}. Routes: /openapi.json."))
