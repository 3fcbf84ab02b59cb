"""A served InferenceService on real sockets, for tests of the protocols."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from cluster.frontend.http_server import build_app
from cluster.frontend.limits import Limits
from cluster.frontend.request import ModelInfo
from cluster.frontend.service import InferenceService
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


@contextmanager
def http_server(service: InferenceService) -> Iterator[str]:
    """The service behind uvicorn on a free port; gives the base URL."""
    config = uvicorn.Config(
        build_app(service), host="127.0.0.1", port=0, lifespan="off", ws="none", log_level="error"
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
