"""Who shares prefixes with whom: those of one API key, and of them those of one `cache_salt`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from starlette.testclient import TestClient

from cluster.config import parse_config
from cluster.frontend.api_keys import KeyRing
from cluster.frontend.auth import Authorizer
from cluster.inline import InlineCluster
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import EOS, grpc_server, http_server, ids_of, make_service

ALICE, BOB = "the-key-of-alice", "a-key-that-bob-has"
PROMPT = list(range(20, 73))
"""53 tokens: three blocks of 16 and a rest."""
BODY = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"alice inference {ALICE}\nbob inference,metrics {BOB}\n")
    return path


# ---- a whole cluster


class Client:
    """Asks a cluster over HTTP for the same answer again and again."""

    def __init__(self, cluster: InlineCluster) -> None:
        self._client = TestClient(cluster.ingress.http_app())
        self.answers: list[list[int]] = []

    def num_cached(self, key: str | None, **more: Any) -> int:
        """Tokens of the prompt that were there before."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        body = {**BODY, "return_token_ids": True, **more}
        answer = self._client.post("/v1/completions", json=body, headers=headers).json()
        self.answers.append(answer["choices"][0]["token_ids"])
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def config(checkpoint_dir: Callable[[str], Path], **more: Any) -> Any:
    engine = {"block_size": 16}
    settings = {"model": str(checkpoint_dir("v3")), "deterministic": True}
    return parse_config({**settings, "attention": {"engine": engine}, **more})


def test_nobody_learns_what_another_key_asked(
    checkpoint_dir: Callable[[str], Path], keys_file: Path
) -> None:
    settings = config(checkpoint_dir, auth={"keys_file": str(keys_file)})
    with InlineCluster(settings) as cluster:
        client = Client(cluster)
        cached = [client.num_cached(key) for key in (ALICE, BOB, ALICE, BOB)]
        assert cached == [0, 0, 48, 48]
        assert client.num_cached(BOB, cache_salt="alice") == 0
        [stats] = cluster.ingress.pool.stats()
        assert stats.cached_tokens == 2 * 48
        assert stats.prompt_tokens == 5 * len(PROMPT) - 2 * 48  # computed
    assert client.answers == client.answers[:1] * 5  # the same tokens, from the cache or not


def test_a_salt_divides_the_requests_of_a_server_without_keys(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    with InlineCluster(config(checkpoint_dir)) as cluster:
        client = Client(cluster)
        assert [client.num_cached(None) for _ in range(2)] == [0, 48]
        salts = ("x", "y", "x", "y ")
        assert [client.num_cached(None, cache_salt=salt) for salt in salts] == [0, 0, 48, 0]
    assert client.answers == client.answers[:1] * 6


# ---- the front ends


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """Loses its first worker behind a token."""
    engine = FakeEngine([*ids_of("ok"), EOS], lose=lambda _, attempt: 1 if attempt == 1 else None)
    yield engine
    engine.close()


def salts(engine: FakeEngine) -> list[str]:
    """Of what was submitted and replayed; forgotten then."""
    found = [submit.cache_salt for submit in (*engine.submitted, *engine.replayed)]
    engine.submitted.clear()
    engine.replayed.clear()
    return found


@pytest.mark.parametrize(
    ("key", "given", "salt"),
    [
        (None, None, ""),
        (None, "s", " s"),
        (ALICE, None, "alice "),
        (BOB, "s", "bob s"),
        (ALICE, "x" * 128, "alice " + "x" * 128),
    ],
)
def test_the_workers_get_the_same_salt_from_both_protocols(
    tmp_path: Path, keys_file: Path, engine: FakeEngine, key: str | None, given: str, salt: str
) -> None:
    authorizer = Authorizer(KeyRing(keys_file) if key else None)
    service = make_service(tmp_path / "model", engine, authorizer=authorizer)
    header = f"Bearer {key}"
    body = {"messages": [{"role": "user", "content": "Hi"}], "cache_salt": given}
    with http_server(service) as url:
        httpx.post(
            url + "/v1/chat/completions",
            json=body,
            headers={"Authorization": header},
            timeout=TIMEOUT_S,
        ).raise_for_status()
    assert salts(engine) == [salt, salt]  # and once again for the second worker
    message = pb.ChatMessage(role="user", content="Hi")
    with grpc_server(service) as address, grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for call, request in (
            (stub.Chat, pb.ChatRequest(messages=[message], cache_salt=given)),
            (stub.Generate, pb.GenerateRequest(text="Hi", cache_salt=given)),
        ):
            list(call(request, metadata=[("authorization", header)], timeout=TIMEOUT_S))
            assert salts(engine) == [salt, salt]
