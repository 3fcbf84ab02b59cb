"""Commands over HTTP: what reaches the directory, and how everything else is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.frontend.operations import Operations
from experts.channel.channel import ChannelTimeout
from experts.messages import (
    Chaos,
    Command,
    CommandRefused,
    Drain,
    Rebalance,
    Replicate,
    Role,
    Scale,
    Snapshot,
    WorkerInfo,
)
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import EOS, http_server, make_service

ROLES: dict[str, Role] = {"e0": "experts", "e1": "experts", "r0": "router", "a0": "attention"}
WORKERS = tuple(
    WorkerInfo(worker_id=name, role=role, endpoint="", pid=1, node="n")
    for name, role in ROLES.items()
)
SNAPSHOT = Snapshot(
    version=1,
    epoch=1,
    ready=True,
    stage="ready",
    workers=WORKERS,
    holders={"1": (("e0",), ("e1",)), "2": (("e0",), ("e1",))},
)


class FakeDirectory:
    """Carries everything out, or raises `error`."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.error: Exception | None = None
        self.snapshot: Snapshot | None = SNAPSHOT

    def command(self, command: Command) -> str:
        self.commands.append(command)
        if self.error is not None:
            raise self.error
        return f"done: {command.type}"


class World:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.directory = FakeDirectory()
        operations = Operations(self.directory.command, lambda: self.directory.snapshot)
        service = make_service(folder, FakeEngine([EOS]))
        self.url = stack.enter_context(http_server(service, operations=operations))

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("model"), stack)


@pytest.fixture
def world(served: World) -> World:
    served.directory.__init__()  # type: ignore[misc]
    return served


DRAIN, REPLICATE = "/v1/experts/drain", "/v1/experts/replicate"
REBALANCE, SCALE, CHAOS = "/v1/experts/rebalance", "/v1/scale", "/v1/chaos"
GOOD: list[tuple[str, dict[str, Any], Command]] = [
    (DRAIN, {"worker": "e1"}, Drain(worker_id="e1")),
    (
        REPLICATE,
        {"layer": 2, "expert": 1, "replicas": 2},
        Replicate(layer=2, expert=1, replicas=2),
    ),
    (REBALANCE, {}, Rebalance()),
    (SCALE, {"tier": "experts", "workers": 4}, Scale(role="experts", workers=4)),
    (SCALE, {"tier": "attention", "workers": None}, Scale(role="attention", workers=None)),
    (
        CHAOS,
        {"action": "stop", "role": "expert", "worker": "e0", "for_s": 2.5},
        Chaos(action="stop", role="experts", worker_id="e0", duration_s=2.5),
    ),
    (
        CHAOS,
        {"action": "kill", "role": "router", "worker": None},
        Chaos(action="kill", role="router", worker_id=None, duration_s=30.0),
    ),
]


@pytest.mark.parametrize(("path", "body", "command"), GOOD)
def test_a_body_becomes_a_command(world: World, path: str, body: Any, command: Command) -> None:
    response = world.post(path, body)
    assert (response.status_code, response.json()) == (200, {"done": f"done: {command.type}"})
    assert world.directory.commands == [command]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "[::", ""]
)
def test_a_name_that_anybody_may_have_is_refused(world: World, host: str) -> None:
    body, headers = {"tier": "experts", "workers": 4}, {"Host": host}
    response = httpx.post(world.url + SCALE, json=body, headers=headers, timeout=TIMEOUT_S)
    assert response.status_code == 403
    assert world.directory.commands == []


@pytest.mark.parametrize("host", ["localhost:80", "10.1.2.3", "[::1]:8000", "shoal.prod.svc"])
def test_addresses_and_service_names_are_fine(world: World, host: str) -> None:
    headers = {"Host": host}
    response = httpx.post(world.url + REBALANCE, json={}, headers=headers, timeout=TIMEOUT_S)
    assert response.status_code == 200


MISTYPED, TOO_SMALL, TOO_LARGE = (
    "invalid_type",
    "integer_below_min_value",
    "integer_above_max_value",
)
MISSING, UNKNOWN = "missing_required_parameter", "unknown_parameter"
CHAOS_BODY = {"action": "kill", "role": "expert"}
# path, body, status, code, param
BAD: list[tuple[str, Any, int, str, str | None]] = [
    (DRAIN, {}, 400, MISSING, "worker"),
    (DRAIN, {"worker": 5}, 400, MISTYPED, "worker"),
    (DRAIN, {"worker": "e9"}, 404, "worker_not_found", "worker"),
    (DRAIN, {"worker": "a0"}, 404, "worker_not_found", "worker"),
    (DRAIN, {"worker": "x" * 100_000}, 404, "worker_not_found", "worker"),
    (DRAIN, {"worker": "e0", "force": True}, 400, UNKNOWN, "force"),
    (DRAIN, [], 400, MISTYPED, None),
    (REPLICATE, {"layer": 1, "expert": 1}, 400, MISSING, "replicas"),
    (REPLICATE, {"layer": 0, "expert": 1, "replicas": 2}, 400, "invalid_value", "layer"),
    (REPLICATE, {"layer": "1", "expert": 1, "replicas": 2}, 400, MISTYPED, "layer"),
    (REPLICATE, {"layer": 1, "expert": 2, "replicas": 2}, 400, TOO_LARGE, "expert"),
    (REPLICATE, {"layer": 1, "expert": -1, "replicas": 2}, 400, TOO_SMALL, "expert"),
    (REPLICATE, {"layer": 1, "expert": 1, "replicas": 0}, 400, TOO_SMALL, "replicas"),
    (REPLICATE, {"layer": 1, "expert": 1, "replicas": 10**9}, 400, TOO_LARGE, "replicas"),
    (REPLICATE, {"layer": 1, "expert": 1, "replicas": True}, 400, MISTYPED, "replicas"),
    (REBALANCE, {"layer": 1}, 400, UNKNOWN, "layer"),
    (SCALE, {"tier": "experts"}, 400, MISSING, "workers"),
    (SCALE, {"tier": "router", "workers": 2}, 400, "invalid_value", "tier"),
    (SCALE, {"tier": "experts", "workers": 0}, 400, TOO_SMALL, "workers"),
    (SCALE, {"tier": "experts", "workers": 5000}, 400, TOO_LARGE, "workers"),
    (SCALE, {"tier": "experts", "workers": 1.5}, 400, MISTYPED, "workers"),
    (CHAOS, {"role": "expert"}, 400, MISSING, "action"),
    (CHAOS, CHAOS_BODY | {"action": "burn"}, 400, "invalid_value", "action"),
    (CHAOS, CHAOS_BODY | {"role": "ingress"}, 400, "invalid_value", "role"),
    (CHAOS, CHAOS_BODY | {"worker": "r0"}, 404, "worker_not_found", "worker"),
    (CHAOS, CHAOS_BODY | {"for_s": 0.0}, 400, "decimal_below_min_value", "for_s"),
    (CHAOS, CHAOS_BODY | {"for_s": 3601.0}, 400, "decimal_above_max_value", "for_s"),
    (CHAOS, CHAOS_BODY | {"for_s": "long"}, 400, MISTYPED, "for_s"),
]


@pytest.mark.parametrize(("path", "body", "status", "code", "param"), BAD)
def test_bad_bodies_never_reach_the_directory(
    world: World, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    response = world.post(path, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"].isprintable() and len(response.content) < 4096
    assert world.directory.commands == []


def test_an_unknown_worker_is_told_the_ids_there_are(world: World) -> None:
    message = world.post(DRAIN, {"worker": "e9"}).json()["error"]["message"]
    assert message == "There is no expert worker 'e9'; there are: e0, e1."


@pytest.mark.parametrize(("path", "body", "command"), GOOD)
def test_a_refusal_is_400_with_the_directorys_line(
    world: World, path: str, body: Any, command: Command
) -> None:
    world.directory.error = CommandRefused("chaos is not enabled; start with enable_chaos")
    response = world.post(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "refused")
    assert error["message"] == "chaos is not enabled; start with enable_chaos"


@pytest.mark.parametrize(("path", "body", "command"), GOOD)
def test_a_directory_that_is_away_is_503(
    world: World, path: str, body: Any, command: Command
) -> None:
    world.directory.error = ChannelTimeout("no answer of the directory within 5.0 s")
    response = world.post(path, body)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "directory_unreachable"


def test_before_the_first_snapshot_nobody_is_known(world: World) -> None:
    world.directory.snapshot = None
    assert world.post(DRAIN, {"worker": "e0"}).status_code == 503
    assert world.post(REPLICATE, {"layer": 1, "expert": 1, "replicas": 2}).status_code == 503


def test_only_json_posts_are_commands(world: World) -> None:
    """A form on another site can post text without asking; it cannot post JSON."""
    response = httpx.post(world.url + REBALANCE, content=b"{}", timeout=TIMEOUT_S)
    assert response.status_code == 415
    assert httpx.get(world.url + SCALE, timeout=TIMEOUT_S).status_code == 405
    assert world.directory.commands == []


def test_openapi_describes_the_commands(world: World) -> None:
    document = httpx.get(world.url + "/openapi.json", timeout=TIMEOUT_S).json()
    for path in (DRAIN, REPLICATE, REBALANCE, SCALE, CHAOS):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = schema["schema"]["$ref"].rpartition("/")[2]
        assert document["components"]["schemas"][name]["additionalProperties"] is False


def test_without_operations_there_are_no_such_routes(tmp_path: Path) -> None:
    with http_server(make_service(tmp_path, FakeEngine([EOS]))) as url:
        for path, body, _ in GOOD:
            assert httpx.post(url + path, json=body, timeout=TIMEOUT_S).status_code == 404
        document = json.dumps(httpx.get(url + "/openapi.json", timeout=TIMEOUT_S).json())
    assert "chaos" not in document
