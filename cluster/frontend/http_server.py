"""The OpenAI-compatible HTTP API over one InferenceService."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.errors import MethodNotAllowed, NotFound, ShoalError
from cluster.frontend.api_docs import DocumentedApp, body_of, generation_docs
from cluster.frontend.expert_load import LoadWatch, add_expert_load
from cluster.frontend.http_generation import GeneratingHandlers
from cluster.frontend.http_guard import HttpGuard, error_response, json_response
from cluster.frontend.json_body import read_json
from cluster.frontend.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from cluster.frontend.operations import BODIES, Operations, add_operations
from cluster.frontend.responses import Json
from cluster.frontend.schema_errors import parse_body
from cluster.frontend.service import InferenceService
from cluster.frontend.web import add_web


def build_app(
    service: InferenceService,
    loads: LoadWatch | None = None,
    operations: Operations | None = None,
    *,
    echo_request_id: bool = True,
) -> FastAPI:
    """All routes; those of the experts' load and of operations if these are given.

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
    app.bodies = (ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
    app.add_middleware(
        HttpGuard,
        limits=lambda: service.limits,
        authorizer=service.authorizer,
        echo_request_id=echo_request_id,
        on_refused=service.on_refused,
    )
    app.add_exception_handler(ShoalError, _on_shoal_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_generation(app, GeneratingHandlers(service))
    _add_tokens(app, service)
    _add_models(app, service)
    _add_state(app, service)
    add_web(app)
    if loads is not None:
        add_expert_load(app, loads, service.limits)
    if operations is not None:
        app.bodies += BODIES
        add_operations(
            app, operations, service.limits, under_any_name=service.authorizer.needs_keys
        )
    return app


def _add_generation(app: FastAPI, handlers: GeneratingHandlers) -> None:
    @app.post("/v1/chat/completions", openapi_extra=generation_docs(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await handlers.chat(request)

    @app.post("/v1/completions", openapi_extra=generation_docs(CompletionRequest))
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
        """Whether requests are served: 200, or 503 with the stage of the start, or of the end."""
        state = service.readiness()
        stopping = "draining" if service.is_draining else "loading"
        body = {
            "status": "ok" if state.ready else stopping,
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
        return json_response({"max_context_tokens": context, **service.limits.model_dump()})


def _model(service: InferenceService, name: str) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": service.model.created,
        "owned_by": "shoal",
        "root": service.model.name,
        "max_model_len": service.model.context_tokens,
    }


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
