"""The load of every expert over HTTP and gRPC, from fakes and from an inline cluster."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from attention.messages import SamplingParams, Submit, TokenOutput
from cluster.config import parse_config
from cluster.errors import InvalidRequest, Unavailable
from cluster.frontend.expert_load import ExpertLoad, LoadWatch
from cluster.frontend.grpc_messages import load_message
from cluster.inline import InlineCluster
from cluster.inline_server import InlineServer
from cluster.launcher import free_port
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from experts.channel.channel import ChannelClosed
from experts.config import ModelConfig
from experts.messages import ClusterLoadReply, Snapshot, WorkerRows
from tests.cluster.conftest import wait_ready
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import EOS, grpc_server, http_server, make_service

LOAD, STREAM = "/v1/experts/load", "/v1/experts/load/stream"
REPLY = ClusterLoadReply(
    epoch=6,
    window_s=60.0,
    recent_s=5.0,
    layers=(1, 2),
    rows=((30, 10), (0, 0)),
    recent_rows=((2, 1), (0, 0)),
    workers=(
        WorkerRows(worker_id="a", rows=(10, 0), recent_rows=(0, 0)),
        WorkerRows(worker_id="b", rows=(30, 0), recent_rows=(3, 0)),
    ),
)
SNAPSHOT = Snapshot(
    version=9,
    epoch=5,
    ready=True,
    stage="ready",
    holders={"1": (("a", "b"), ("b",)), "2": ((), ("a",))},
)
BODY = {
    "model": "tiny",
    "epoch": 5,
    "window_s": 60.0,
    "recent_s": 5.0,
    "workers": [
        {"worker_id": "a", "rows": 10, "recent_rows": 0},
        {"worker_id": "b", "rows": 30, "recent_rows": 3},
    ],
    "layers": [
        {
            "layer": 1,
            "balancedness": 20 / 30,
            "expert_balancedness": 20 / 30,
            "experts": [
                {"expert": 0, "rows": 30, "recent_rows": 2, "replicas": 2, "holders": ["a", "b"]},
                {"expert": 1, "rows": 10, "recent_rows": 1, "replicas": 1, "holders": ["b"]},
            ],
        },
        {
            "layer": 2,
            "balancedness": 1.0,
            "expert_balancedness": 1.0,
            "experts": [
                {"expert": 0, "rows": 0, "recent_rows": 0, "replicas": 0, "holders": []},
                {"expert": 1, "rows": 0, "recent_rows": 0, "replicas": 1, "holders": ["a"]},
            ],
        },
    ],
}

COMPACT = {
    "model": "tiny",
    "epoch": 5,
    "window_s": 60.0,
    "recent_s": 5.0,
    "layers": [1, 2],
    "workers": ["a", "b"],
    "rows": [[30, 10], [0, 0]],
    "recent_rows": [[2, 1], [0, 0]],
    "holders": [[[0, 1], [1]], [[], [0]]],
    "balancedness": [20 / 30, 1.0],
    "expert_balancedness": [20 / 30, 1.0],
}


class FakeDirectory:
    """Answers REPLY until it is `gone`; counts the questions."""

    def __init__(self) -> None:
        self.gone = False
        self.asked = 0

    def ask(self) -> ClusterLoadReply:
        self.asked += 1
        if self.gone:
            raise ChannelClosed("no line to the directory")
        return REPLY


class FakeClock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """A LoadWatch over a fake directory; served on demand."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.directory = FakeDirectory()
        self.loads = LoadWatch("tiny", self.directory.ask, lambda: SNAPSHOT)
        self._folder, self._stack = folder, stack

    def url(self) -> str:
        service = make_service(self._folder, FakeEngine([EOS]))
        return self._stack.enter_context(http_server(service, self.loads))

    def stub(self) -> Any:
        service = make_service(self._folder, FakeEngine([EOS]))
        address = self._stack.enter_context(grpc_server(service, self.loads))
        channel = self._stack.enter_context(grpc.insecure_channel(address))
        return inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, stack)


# ---- LoadWatch


def test_those_who_ask_together_share_one_question(world: World) -> None:
    clock = FakeClock()
    loads = LoadWatch("tiny", world.directory.ask, lambda: SNAPSHOT, clock)

    async def ask() -> None:
        found = await asyncio.gather(*(loads.read() for _ in range(5)))
        assert world.directory.asked == 1 and len(set(map(id, found))) == 1
        clock.now_s += 0.1
        assert await loads.read() is found[0]
        clock.now_s += 0.1
        assert await loads.read() is not found[0]
        assert world.directory.asked == 2

    asyncio.run(ask())


def test_a_failure_is_not_remembered(world: World) -> None:
    world.directory.gone = True

    async def ask() -> ExpertLoad:
        for _ in range(2):
            with pytest.raises(Unavailable):
                await world.loads.read()
        world.directory.gone = False
        return await world.loads.read()

    assert json.loads(asyncio.run(ask()).body) == BODY


def test_without_a_snapshot_nothing_is_known(world: World) -> None:
    loads = LoadWatch("tiny", world.directory.ask, lambda: None)
    with pytest.raises(Unavailable):
        asyncio.run(loads.read())


@pytest.mark.parametrize("interval_s", [0.19, 60.1, -1.0, 0.0, float("nan"), float("inf")])
def test_interval_is_bounded(world: World, interval_s: float) -> None:
    async def watch() -> None:
        await anext(world.loads.watch(interval_s))

    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(watch())
    assert caught.value.param == "interval_s"
    assert world.directory.asked == 0


def test_watching_ends_at_close_whatever_the_interval(world: World) -> None:
    async def watch() -> int:
        seen = 0
        async for _ in world.loads.watch(60.0):
            seen += 1
            world.loads.close()
        return seen

    assert asyncio.run(asyncio.wait_for(watch(), TIMEOUT_S)) == 1


@pytest.mark.parametrize(("interval_s", "num_loads"), [(1.0, 10), (4.0, 3), (60.0, 1)])
def test_watching_ends_by_itself(world: World, interval_s: float, num_loads: int) -> None:
    """After ten seconds or one interval: an ingress can stop although it is watched."""
    clock = FakeClock()
    loads = LoadWatch("tiny", world.directory.ask, lambda: SNAPSHOT, clock)

    async def watch() -> int:
        seen = 0
        async for _ in loads.watch(interval_s):
            seen += 1
            clock.now_s += interval_s
        return seen

    assert asyncio.run(asyncio.wait_for(watch(), TIMEOUT_S)) == num_loads


def test_holders_of_an_expert_that_the_snapshot_lacks() -> None:
    """The ingress may hear of the load before it hears of who holds what."""
    before = Snapshot(version=1, epoch=0, ready=False, stage="loading")
    layer = json.loads(ExpertLoad("tiny", REPLY, before).body)["layers"][0]
    assert (layer["experts"][0]["replicas"], layer["experts"][0]["holders"]) == (0, [])


def test_a_holder_that_the_reply_lacks_comes_after_its_workers() -> None:
    """The ingress may hear of a worker that is gone, or that came, before it hears of the load."""
    newer = SNAPSHOT.model_copy(update={"holders": {"1": (("b", "c"), ("c",)), "2": ((), ("d",))}})
    body = json.loads(ExpertLoad("tiny", REPLY, newer).compact_body)
    assert body["workers"] == ["a", "b", "c", "d"]
    assert body["holders"] == [[[1, 2], [2]], [[], [3]]]


# ---- HTTP


def test_whole_matrix_with_replicas_and_holders(world: World) -> None:
    response = httpx.get(world.url() + LOAD, timeout=TIMEOUT_S)
    assert response.headers["content-type"] == "application/json"
    assert (response.status_code, response.json()) == (200, BODY)


def test_compact_is_the_same_as_matrices(world: World) -> None:
    url = world.url()
    assert httpx.get(f"{url}{LOAD}?compact=true", timeout=TIMEOUT_S).json() == COMPACT
    assert httpx.get(f"{url}{LOAD}?compact=false", timeout=TIMEOUT_S).json() == BODY
    stream = f"{url}{STREAM}?interval_s=0.2&compact=true"
    with httpx.stream("GET", stream, timeout=TIMEOUT_S) as response:
        lines = events(response)
        assert [json.loads(next(lines)) for _ in range(2)] == [COMPACT] * 2


@pytest.mark.parametrize("path", [LOAD, STREAM])
@pytest.mark.parametrize("compact", ["1", "True", "", "yes"])
def test_bad_compact_is_400(world: World, path: str, compact: str) -> None:
    response = httpx.get(f"{world.url()}{path}?compact={compact}", timeout=TIMEOUT_S)
    assert response.status_code == 400 and world.directory.asked == 0
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("compact", "invalid_type")


@pytest.mark.parametrize("path", [LOAD, STREAM])
def test_directory_out_of_reach_is_503(world: World, path: str) -> None:
    world.directory.gone = True
    response = httpx.get(world.url() + path, timeout=TIMEOUT_S)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "directory_unreachable"


@pytest.mark.parametrize(
    ("interval", "code"),
    [
        ("0.1", "decimal_below_min_value"),
        ("61", "decimal_above_max_value"),
        ("nan", "invalid_value"),
        ("soon", "invalid_type"),
        ("", "invalid_type"),
    ],
)
def test_bad_interval_is_400(world: World, interval: str, code: str) -> None:
    url = f"{world.url()}{STREAM}?interval_s={interval}"
    response = httpx.get(url, timeout=TIMEOUT_S)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("interval_s", code)


def events(response: httpx.Response) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in response.iter_lines() if line)


def test_stream_repeats_and_ends_cleanly_at_shutdown(world: World) -> None:
    url = f"{world.url()}{STREAM}?interval_s=0.2"
    with httpx.stream("GET", url, timeout=TIMEOUT_S) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-store"
        lines = events(response)
        assert [json.loads(next(lines)) for _ in range(3)] == [BODY] * 3
        world.loads.close()
        assert [line for line in lines if not line.startswith("{")] == ["[DONE]"]
    assert httpx.get(url, timeout=TIMEOUT_S).json()["error"]["code"] == "draining"


def test_stream_that_fails_ends_with_an_error_event(world: World) -> None:
    url = f"{world.url()}{STREAM}?interval_s=0.2"
    with httpx.stream("GET", url, timeout=TIMEOUT_S) as response:
        lines = events(response)
        next(lines)
        world.directory.gone = True
        *_, last = lines
    assert json.loads(last)["error"]["code"] == "directory_unreachable"


def end_of_watch(loads: LoadWatch) -> threading.Event:
    """Set when a watch has ended."""
    watch, ended = loads.watch, threading.Event()

    async def observed(interval_s: float | None) -> Any:
        try:
            async for load in watch(interval_s):
                yield load
        finally:
            ended.set()

    loads.watch = observed  # type: ignore[method-assign]
    return ended


def test_client_that_leaves_ends_its_watch(world: World) -> None:
    ended = end_of_watch(world.loads)
    with httpx.stream("GET", world.url() + STREAM, timeout=TIMEOUT_S) as response:
        lines = events(response)
        next(lines)
        assert not ended.is_set()
    assert ended.wait(TIMEOUT_S)


def test_openapi_describes_the_parameters(world: World) -> None:
    paths = httpx.get(world.url() + "/openapi.json", timeout=TIMEOUT_S).json()["paths"]
    interval, compact = paths[STREAM]["get"]["parameters"]
    assert (interval["name"], interval["schema"]["minimum"]) == ("interval_s", 0.2)
    assert (compact["name"], compact["schema"]["type"]) == ("compact", "boolean")
    assert paths[LOAD]["get"]["parameters"] == [compact]


# ---- gRPC


def test_watch_load_streams_the_same_data(world: World) -> None:
    call = world.stub().WatchLoad(pb.WatchLoadRequest(interval_s=0.2), timeout=TIMEOUT_S)
    first, second = next(call), next(call)
    assert first == second == load_message(ExpertLoad("tiny", REPLY, SNAPSHOT))
    assert (first.model, first.epoch, first.window_s, first.recent_s) == ("tiny", 5, 60.0, 5.0)
    workers = [(worker.worker_id, worker.rows, worker.recent_rows) for worker in first.workers]
    assert workers == [("a", 10, 0), ("b", 30, 3)]
    layer = first.layers[0]
    assert (layer.layer, layer.balancedness) == (1, 20 / 30)
    expert = layer.experts[0]
    assert (expert.expert, expert.rows, expert.recent_rows, expert.replicas) == (0, 30, 2, 2)
    assert list(expert.holders) == ["a", "b"]
    world.loads.close()
    list(call)
    assert call.code() is grpc.StatusCode.OK


def test_watchers_of_one_load_share_its_message(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """45 ms of the interpreter at V3's size."""
    made: list[pb.ExpertLoad] = []

    def make(load: ExpertLoad) -> pb.ExpertLoad:
        made.append(load_message(load))
        return made[-1]

    monkeypatch.setattr("cluster.frontend.grpc_messages.load_message", make)
    world.loads = LoadWatch("tiny", world.directory.ask, lambda: SNAPSHOT, FakeClock())
    stub = world.stub()
    calls = [stub.WatchLoad(pb.WatchLoadRequest(), timeout=TIMEOUT_S) for _ in range(3)]
    told = [next(call) for call in calls]
    assert (told, len(made)) == (made * 3, 1)
    for call in calls:
        call.cancel()


def test_cancelled_call_ends_its_watch(world: World) -> None:
    ended = end_of_watch(world.loads)
    call = world.stub().WatchLoad(pb.WatchLoadRequest(), timeout=TIMEOUT_S)
    next(call)
    assert not ended.is_set()
    call.cancel()
    assert ended.wait(TIMEOUT_S)


def failed(call: Any) -> tuple[pb.ExpertLoad, Any]:
    """The last message of a failing stream and its status."""
    last = pb.ExpertLoad()
    with pytest.raises(grpc.RpcError) as caught:
        for message in call:
            last = message
    return last, caught.value.code()


@pytest.mark.parametrize("interval_s", [0.1, 61.0, float("nan"), 0.0])
def test_watch_load_checks_the_interval(world: World, interval_s: float) -> None:
    request = pb.WatchLoadRequest(interval_s=interval_s)
    last, code = failed(world.stub().WatchLoad(request, timeout=TIMEOUT_S))
    assert last.error.param == "interval_s"
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_watch_load_says_that_the_directory_is_away(world: World) -> None:
    world.directory.gone = True
    last, code = failed(world.stub().WatchLoad(pb.WatchLoadRequest(), timeout=TIMEOUT_S))
    assert last.error.code == "directory_unreachable" and not last.layers
    assert code is grpc.StatusCode.UNAVAILABLE


# ---- a whole cluster


NUM_NEW_TOKENS = 5
PROMPTS = ([20, 30, 40], [50] * 17)
REDUNDANCY = 16


@pytest.fixture
def folder(checkpoint_dir: Callable[[str], Path]) -> Path:
    return checkpoint_dir("v2-lite")


@pytest.fixture
def cluster(folder: Path) -> Iterator[InlineCluster]:
    settings = {
        "model": str(folder),
        "experts": {"num_workers": 2, "redundancy": REDUNDANCY},
        "router": {"worker": {"hop_timeout_s": TIMEOUT_S}},  # nothing is computed twice
    }
    with InlineCluster(parse_config(settings)) as cluster:
        yield cluster


def generate(cluster: InlineCluster, prompt: list[int]) -> None:
    done = threading.Event()

    def on_output(output: TokenOutput) -> None:
        if output.finish_reason is not None:
            done.set()

    params = SamplingParams(max_tokens=NUM_NEW_TOKENS, ignore_eos=True, temperature=0.0)
    request = Submit(request_id=f"r{len(prompt)}", prompt_ids=prompt, params=params)
    cluster.ingress.pool.submit(request, on_output)
    assert done.wait(TIMEOUT_S)


async def watch_until(loads: LoadWatch, num_rows: int, num_replicas: int) -> Any:
    """The first load that has all the rows and replicas, which may follow when all is ready."""
    async for load in loads.watch(0.2):
        body = json.loads(load.body)
        experts = [expert for layer in body["layers"] for expert in layer["experts"]]
        rows, replicas = (sum(e[name] for e in experts) for name in ("rows", "replicas"))
        if rows >= num_rows and replicas >= num_replicas:
            return body
    raise AssertionError("the watch ended")


def test_inline_cluster_counts_each_row_once(cluster: InlineCluster, folder: Path) -> None:
    model = ModelConfig.load(folder)
    for prompt in PROMPTS:
        generate(cluster, prompt)
    # The last token of an answer is sampled and never computed on.
    num_tokens = sum(len(prompt) + NUM_NEW_TOKENS - 1 for prompt in PROMPTS)
    num_rows = num_tokens * model.num_experts_per_tok
    num_replicas = len(model.moe_layers) * model.n_routed_experts + REDUNDANCY

    async def read() -> Any:
        all_rows = num_rows * len(model.moe_layers)
        watch = watch_until(cluster.ingress.loads, all_rows, num_replicas)
        return await asyncio.wait_for(watch, TIMEOUT_S)

    body = asyncio.run(read())
    assert [layer["layer"] for layer in body["layers"]] == list(model.moe_layers)
    for layer in body["layers"]:
        assert sum(expert["rows"] for expert in layer["experts"]) == num_rows
        assert 0 < layer["balancedness"] <= 1 and 0 < layer["expert_balancedness"] <= 1

    counted = Counter[tuple[int, int]]()
    holders: dict[tuple[int, int], list[str]] = {}
    for member in cluster.experts:
        for layer, rows in member.worker.load_counter.totals().items():
            counted.update({(layer, expert): count for expert, count in enumerate(rows)})
        for key in member.worker.holds:
            holders.setdefault(key, []).append(member.worker.worker_id)
    told = {
        (layer["layer"], expert["expert"]): (expert["rows"], expert["replicas"], expert["holders"])
        for layer in body["layers"]
        for expert in layer["experts"]
    }
    assert told == {key: (counted[key], len(names), names) for key, names in holders.items()}
    assert sum(replicas for _, replicas, _ in told.values()) == num_replicas
    snapshot = cluster.ingress.pool.snapshot()
    assert snapshot is not None and body["epoch"] == snapshot.epoch
    assert body["window_s"] == 60.0


def test_inline_cluster_answers_over_http_and_notices_a_lost_directory(
    cluster: InlineCluster,
) -> None:
    transport = httpx.ASGITransport(app=cluster.ingress.http_app())

    async def read() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as client:
            body = (await client.get(LOAD)).json()
            assert body["model"] == cluster.ingress.service.model.name
            workers = [worker["worker_id"] for worker in body["workers"]]
            assert workers == ["experts-0", "experts-1"]
            cluster.placement.close()
            response = await client.get(LOAD)
            while response.status_code == 200:  # the answer of just before
                response = await client.get(LOAD)
            assert response.status_code == 503 and response.headers["retry-after"] == "1"

    asyncio.run(asyncio.wait_for(read(), TIMEOUT_S))


def test_inline_server_drains_in_spite_of_a_watch(folder: Path) -> None:
    port = free_port()
    server = InlineServer(parse_config({"model": str(folder), "listen": {"http_port": port}}))
    server.start()
    url = f"http://127.0.0.1:{port}{STREAM}?interval_s=60"
    try:
        wait_ready(f"http://127.0.0.1:{port}")
        with httpx.stream("GET", url, timeout=TIMEOUT_S) as response:
            lines = events(response)
            assert "layers" in json.loads(next(lines))
            drain = threading.Thread(target=server.drain, daemon=True)
            drain.start()
            assert list(lines) == ["[DONE]"]
        drain.join(TIMEOUT_S)
        assert not drain.is_alive()
    finally:
        server.stop()
