"""A served InferenceService on real sockets, for tests of the protocols."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import uvicorn
from grpc_health.v1 import health_pb2_grpc
from starlette.types import ASGIApp

from cluster.backend import AttentionPool
from cluster.frontend.expert_load import LoadWatch
from cluster.frontend.grpc_server import GrpcMethods
from cluster.frontend.http_server import build_app
from cluster.frontend.operations import Operations
from cluster.frontend.request import ModelInfo
from cluster.frontend.service import InferenceService
from cluster.limits import Limits
from cluster.protos import inference_pb2_grpc
from cluster.tiny_tokenizer import tokenizer_config, tokenizer_json
from cluster.tokenizer import Tokenizer
from tests.fakes import TIMEOUT_S, FakeEngine

VOCAB_SIZE = 512
CONTEXT = 128
EOS = 1
FIRST_BYTE = 17
"""Id of byte 0 in the tiny tokenizer: byte b is FIRST_BYTE + b."""


def write_tokenizer(folder: Path, **settings: object) -> Path:
    """The tiny byte-level tokenizer; `settings` go into tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    config = tokenizer_config(CONTEXT) | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def ids_of(text: str) -> list[int]:
    """Byte tokens of a text, worked out without the tokenizer."""
    return [FIRST_BYTE + byte for byte in text.encode()]


def make_service(
    folder: Path, engine: FakeEngine, limits: Limits | None = None, **options: object
) -> InferenceService:
    """A service over the fake engine; its one model is called "tiny"."""
    tokenizer = Tokenizer(write_tokenizer(folder), VOCAB_SIZE)
    model = ModelInfo("tiny", VOCAB_SIZE, CONTEXT, aliases=("tiny-alias",), temperature=0.6)
    return InferenceService(tokenizer, engine, model, limits, **options)  # type: ignore[arg-type]


def wait_connected(pool: AttentionPool, num_workers: int) -> None:
    """Until requests go to so many attention workers: to be ready a cluster needs one."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(pool.stats()) < num_workers:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@contextmanager
def http_server(
    service: InferenceService,
    loads: LoadWatch | None = None,
    operations: Operations | None = None,
    status: dict[str, Any] | None = None,
) -> Iterator[str]:
    """The service behind uvicorn on a free port; gives the base URL. `status`: body of /status."""
    app = build_app(service, loads, operations)
    if status is not None:
        app.add_api_route("/status", lambda: status)
    with served(app) as url:
        yield url


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """An application behind uvicorn on a free port; gives the base URL."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        lifespan="off",
        ws="none",
        log_level="error",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + TIMEOUT_S
    while not server.started:
        if time.monotonic() > deadline or not thread.is_alive():
            raise RuntimeError("uvicorn did not start")
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)


class _Methods(GrpcMethods):
    """The mixin as a deployment would inherit it."""

    def __init__(self, service: InferenceService, loads: LoadWatch | None) -> None:
        self.service = service
        if loads is not None:
            self.loads = loads


class _Adapter:
    """Calls the mixin's methods as Ray Serve's proxy does: by name, with `grpc_context`."""

    STREAMS = ("Generate", "Chat", "Watch", "WatchLoad")

    def __init__(self, methods: GrpcMethods) -> None:
        self._methods = methods

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._methods, name)

        async def unary(request: Any, context: Any) -> Any:
            return await method(request, grpc_context=context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            async with aclosing(method(request, grpc_context=context)) as messages:
                async for message in messages:
                    yield message

        return stream if name in self.STREAMS else unary


@contextmanager
def grpc_server(service: InferenceService, loads: LoadWatch | None = None) -> Iterator[str]:
    """The service behind grpc.aio on a free port, in a thread; gives the address."""
    address: list[str] = []
    started = threading.Event()
    stopping: list[Any] = []

    async def serve() -> None:
        server = grpc.aio.server()
        adapter = _Adapter(_Methods(service, loads))
        inference_pb2_grpc.add_InferenceServicer_to_server(adapter, server)
        health_pb2_grpc.add_HealthServicer_to_server(adapter, server)
        address.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        stop = asyncio.Event()
        stopping.extend((asyncio.get_running_loop(), stop))
        await server.start()
        started.set()
        await stop.wait()
        await server.stop(grace=None)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    if not started.wait(TIMEOUT_S):
        raise RuntimeError("the gRPC server did not start")
    try:
        yield address[0]
    finally:
        loop, stop = stopping
        loop.call_soon_threadsafe(stop.set)
        thread.join(TIMEOUT_S)
