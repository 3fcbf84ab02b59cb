"""Section 4: the application on Ray, its workers sharing this GPU, answers a request."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gpu_check.plan import Context, Unit
from gpu_check.rows import Check, Note, Row

PRESET = "v3"
PROMPT, NUM_TOKENS = "one two three", 8
SETTINGS = {
    "device": "cuda",
    "listen": {"http_port": 0, "grpc_port": 0},
    "attention": {"num_gpus": 0.4, "engine": {"max_model_len": 1024, "max_num_seqs": 8}},
    "experts": {"num_workers": 2, "num_gpus": 0.2},
}


def units(context: Context) -> Iterator[Unit]:
    """One: it takes Ray up and down."""
    yield Unit("application on Ray", lambda: [serve(context)])


def serve(context: Context) -> Row:
    """A completion, checked for its length."""
    if context.smoke:
        return Note("application on Ray", "skipped: needs a GPU", failed=False)
    import ray  # noqa: F401 - whether it is there, before anything is written

    from cluster.config import parse_config
    from cluster.http_client import ApiClient
    from cluster.session import running
    from cluster.tiny_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory(prefix="shoal-gpu-") as folder:
        model = Path(folder) / "tiny"
        write_checkpoint(model, PRESET)
        config = parse_config(SETTINGS | {"model": str(model)})
        begin = time.monotonic()
        with running(config, dashboard=False) as server:
            ready_s = time.monotonic() - begin
            body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True}
            body |= {"model": "tiny", "temperature": 0}
            answer = ApiClient(server.url).post("/v1/completions", body)
            gpus = server.gpus
    produced = answer["usage"]["completion_tokens"]
    wrong = "" if produced == NUM_TOKENS else f"{produced} tokens, asked for {NUM_TOKENS}"
    note = f"ready after {ready_s:.0f} s; {gpus}"
    return Check("application on Ray", f"tiny {PRESET}", "bfloat16", 0.0, 0.0, wrong, note)
