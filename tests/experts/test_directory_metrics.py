"""Samples: those that members report, and the directory's own."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from experts.channel.channel import ChannelClosed, ChannelError, Connection, Server, connect
from experts.channel.frame import Frame, Status, reply_to
from experts.directory.client import DirectoryClient
from experts.directory.roster import RosterRules
from experts.directory.server import Directory
from experts.load import pack
from experts.messages import (
    MAX_SAMPLES,
    Leave,
    LoadReport,
    Message,
    MetricsReply,
    MetricsReport,
    MetricsRequest,
    Role,
    Scale,
    decode,
    encode,
)
from experts.metrics import Sample
from experts.placement.space import ExpertSpace
from tests.experts.pool import register

SECRET = b"test secret"
SPACE = ExpertSpace(moe_layers=(3, 4), num_experts=4)
RULES = RosterRules(
    SPACE,
    expected_experts=2,
    needs_router=False,
    fixed_sizes={"experts": 2},
)
PATIENCE_S = 60.0  # only a broken test waits so long
BUSY = Sample("shoal_worker_busy", (), 0.5)
HOPS = Sample("shoal_hop_seconds_bucket", (("part", "wire"), ("le", "0.1")), 7.0)


class FakeConnection:
    """The directory's end of a connection; what is sent is forgotten."""

    peer = "fake"

    def send(self, frame: Frame, timeout_s: float | None = None) -> None:
        """Nobody receives it."""

    def close(self) -> None:
        """There is nothing to close."""


class World:
    """A directory spoken to without channels."""

    def __init__(self) -> None:
        self.directory = Directory(RULES)

    def say(self, connection: FakeConnection, message: Message) -> Frame | None:
        return self.directory.handle(encode(message, 5), connection)  # type: ignore[arg-type]

    def join(self, worker_id: str, role: Role = "experts") -> FakeConnection:
        connection = FakeConnection()
        assert self.say(connection, register(worker_id, role, slots=4)) is None
        return connection

    def end(self, connection: FakeConnection) -> None:
        self.directory.connection_closed(connection)  # type: ignore[arg-type]

    def told(self, asker: FakeConnection) -> dict[str, tuple[str, tuple[Sample, ...]]]:
        """worker_id -> role, samples; in the order of the reply."""
        reply = self.say(asker, MetricsRequest())
        assert reply is not None and reply.request_id == 5
        answer = decode(reply)
        assert isinstance(answer, MetricsReply)
        return {worker.worker_id: (worker.role, worker.samples) for worker in answer.workers}

    def gone(self, asker: FakeConnection) -> dict[str, float]:
        """What members that are gone had counted."""
        reply = self.say(asker, MetricsRequest())
        assert reply is not None
        answer = decode(reply)
        assert isinstance(answer, MetricsReply)
        return {sample.name: sample.value for sample in answer.gone if not sample.labels}

    def own(self, name: str) -> dict[str, float]:
        """A series of the directory: the value of its label ("" without) -> its value."""
        samples = [sample for sample in self.directory.samples() if sample.name == name]
        return {"".join(value for _, value in s.labels): s.value for s in samples}


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.directory.close()


def test_of_each_live_member_the_newest_report_counts(world: World) -> None:
    b, a = world.join("b"), world.join("a", "attention")
    assert world.say(b, MetricsReport(samples=(HOPS, BUSY))) is None
    world.say(b, MetricsReport(samples=(BUSY, HOPS._replace(value=8.0))))
    told = world.told(a)
    assert list(told) == ["placement", "a", "b"]
    assert told["a"] == ("attention", ())
    assert told["b"] == ("experts", (BUSY, HOPS._replace(value=8.0)))
    assert told["b"][1][1].labels == HOPS.labels
    assert told["placement"] == ("placement", tuple(world.directory.samples()))

    world.join("b")  # takes the place of b, whose connection has not ended yet
    assert world.told(a)["b"] == ("experts", ())


def test_samples_go_with_their_member(world: World) -> None:
    b, a = world.join("b"), world.join("a")
    world.say(b, MetricsReport(samples=(BUSY,)))
    world.end(b)
    assert list(world.told(a)) == ["placement", "a"]


def faults(late: float, lost: float, hedges: float) -> MetricsReport:
    """A report of counters, a gauge and a bucket."""
    counted = {"late": late, "lost": lost}.items()
    by_fault = (Sample("shoal_hop_faults_total", (("fault", name),), n) for name, n in counted)
    return MetricsReport(samples=(*by_fault, Sample("shoal_hedges_total", (), hedges), BUSY, HOPS))


def test_counters_of_members_that_are_gone_are_kept(world: World) -> None:
    asker, *members = world.join("a", "ingress"), world.join("b"), world.join("c")
    assert world.gone(asker) == {}
    for member in members:
        world.say(member, faults(2, 1, 5))
        world.end(member)
    assert world.gone(asker) == {"shoal_hop_faults_total": 6, "shoal_hedges_total": 10}


def test_a_member_whose_line_broke_is_not_counted_twice(world: World) -> None:
    asker = world.join("a", "ingress")
    world.say(world.join("b"), faults(2, 1, 5))
    again = world.join("b")  # it has not reported yet: what it said last counts
    assert world.gone(asker) == {"shoal_hop_faults_total": 3, "shoal_hedges_total": 5}
    world.say(again, faults(2, 2, 5))
    assert world.gone(asker) == {}
    world.end(again)
    assert world.gone(asker) == {"shoal_hop_faults_total": 4, "shoal_hedges_total": 5}
    world.say(world.join("b"), faults(1, 0, 5))  # another process
    assert world.gone(asker) == {"shoal_hop_faults_total": 4}


def test_members_that_are_long_gone_are_one_sum(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.directory.reports.MAX_ABSENT", 2)
    asker = world.join("a", "ingress")
    for number in range(1, 6):
        member = world.join(f"b{number}")
        world.say(member, faults(0, 0, number))
        world.end(member)
        assert len(world.directory._reports._absent) == min(number, 2)
    assert world.gone(asker)["shoal_hedges_total"] == 1 + 2 + 3 + 4 + 5


def loads(rows: list[list[int]], recent_rows: list[list[int]]) -> LoadReport:
    return LoadReport(
        window_s=60.0,
        rows=pack(np.array(rows)),
        recent_s=5.0,
        recent_rows=pack(np.array(recent_rows)),
    )


def test_imbalance_is_the_busiest_worker_by_the_mean_of_all(world: World) -> None:
    a, b, nothing = world.join("a"), world.join("b"), [[0] * 4] * 2
    assert world.own("shoal_layer_imbalance") == {"3": 1.0, "4": 1.0}
    world.say(a, loads([[6, 0, 0, 0], [0] * 4], nothing))
    world.say(b, loads([[1, 1, 0, 0], [0, 5, 0, 0]], nothing))
    assert world.own("shoal_layer_imbalance") == {"3": 6 / 4, "4": 5 / 2.5}


def test_the_busiest_experts_are_named_by_rank(world: World) -> None:
    a, b, nothing = world.join("a"), world.join("b"), [[0] * 4] * 2
    world.say(a, loads(nothing, [[5, 0, 0, 0], [0, 0, 9, 0]]))
    world.say(b, loads(nothing, [[0, 0, 0, 0], [0, 0, 1, 0]]))
    ranks = [str(rank) for rank in range(1, 9)]  # of 8 experts
    rates, layers, experts = (
        world.own(f"shoal_expert_{what}") for what in ("rows_per_s", "rank_layer", "rank_expert")
    )
    assert list(rates) == list(layers) == list(experts) == ranks
    assert [rates[rank] for rank in ranks] == [2.0, 1.0, *[0.0] * 6]
    assert [(layers[rank], experts[rank]) for rank in ranks[:3]] == [(4, 2), (3, 0), (-1, -1)]


def test_replicas_are_wanted_by_command_or_by_a_policy_or_as_configured(world: World) -> None:
    """What a policy wants of a tier that follows the load is known once somebody has noted it."""
    a, b = world.join("a"), world.join("b")
    attention = [world.join(f"att{i}", "attention") for i in range(3)]
    world.join("i", "ingress")
    present = {"experts": 2, "attention": 3, "router": 0}
    assert world.own("shoal_replicas_present") == present
    assert world.own("shoal_replicas_wanted") == {"experts": 2}
    for connection in (b, *attention):
        world.end(connection)
    assert world.own("shoal_replicas_present") == {"experts": 1, "attention": 0, "router": 0}
    assert world.own("shoal_replicas_wanted") == {"experts": 2}
    world.directory.note_sizes({"attention": 4})
    assert world.own("shoal_replicas_wanted") == {"experts": 2, "attention": 4}
    world.say(a, Scale(role="experts", workers=3))
    world.say(a, Scale(role="attention", workers=1))
    assert world.own("shoal_replicas_wanted") == {"experts": 3, "attention": 1}
    world.directory.note_sizes({"attention": 5})
    world.say(a, Scale(role="attention", workers=None))
    assert world.own("shoal_replicas_wanted") == {"experts": 3, "attention": 5}


def test_who_leaves_has_not_died(world: World) -> None:
    roles: tuple[Role, ...] = ("attention", "router", "experts", "ingress")
    assert world.own("shoal_worker_deaths_total") == dict.fromkeys(roles, 0)
    for role in roles:
        world.end(world.join(f"{role}-1", role))
        leaver = world.join(f"{role}-2", role)
        assert world.say(leaver, Leave()) is None
        world.end(leaver)
    assert world.own("shoal_worker_deaths_total") == dict.fromkeys(roles, 1)


def test_epoch_and_readiness(world: World) -> None:
    world.join("att", "attention")
    assert world.own("shoal_placement_ready") == {"": 0}
    holds = [(layer, expert) for layer in (3, 4) for expert in range(4)]
    worker = register("a", slots=8, holds=holds, seen_epoch=41, seen_version=70)
    world.say(FakeConnection(), worker)
    assert world.directory.snapshot.ready
    assert world.own("shoal_placement_ready") == {"": 1}
    assert world.own("shoal_placement_epoch") == {"": world.directory.snapshot.epoch}
    assert world.directory.snapshot.epoch > 41


def test_own_samples_fit_a_reply_whatever_the_number_of_layers() -> None:
    space = ExpertSpace(moe_layers=tuple(range(1000)), num_experts=4)
    samples = Directory(RosterRules(space, 1)).samples()
    assert len(MetricsReport(samples=samples).samples) < MAX_SAMPLES


# ---------------------------------------------------------------- over channels


class Cluster:
    """A directory and members that are closed at the end."""

    def __init__(self, stack: contextlib.ExitStack, endpoint: str) -> None:
        self.stack, self.endpoint = stack, endpoint

    def serve(self) -> Directory:
        directory = Directory(RULES, silence_limit_s=10.0)
        directory.start(self.endpoint, SECRET)
        self.stack.callback(directory.close)
        return directory

    def add(
        self, worker_id: str, role: Role, source: Callable[[], Sequence[Sample]] | None = None
    ) -> DirectoryClient:
        client = DirectoryClient(
            lambda: self.endpoint,
            SECRET,
            register(worker_id, role),
            metrics_source=source,
            ping_interval_s=1.0 if source is None else 0.1,
        )
        self.stack.callback(client.close)
        client.start()
        return client


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(stack, f"unix:{tmp_path}/d.sock")


def wait_until(test: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not test():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def samples_of(asker: DirectoryClient, worker_id: str) -> tuple[Sample, ...] | None:
    """None while the worker is no member, or there is no line."""
    with contextlib.suppress(ChannelError):
        for worker in asker.ask_metrics(PATIENCE_S).workers:
            if worker.worker_id == worker_id:
                return worker.samples
    return None


def test_samples_are_told_when_they_change_and_to_every_new_directory(cluster: Cluster) -> None:
    directory, asked = cluster.serve(), [0]
    told: dict[Connection, list[tuple[Sample, ...]]] = {}  # by line
    take = directory._take_metrics

    def take_noted(report: MetricsReport, connection: Connection) -> None:
        told.setdefault(connection, []).append(report.samples)
        take(report, connection)

    directory._take_metrics = take_noted  # type: ignore[method-assign]
    now = [BUSY]

    def source() -> list[Sample]:
        asked[0] += 1
        return list(now)

    asker = cluster.add("i", "ingress")
    cluster.add("r", "router", source)
    wait_until(lambda: asked[0] >= 3)
    wait_until(lambda: samples_of(asker, "r") == (BUSY,))
    assert all(samples == [(BUSY,)] for samples in told.values())
    now.append(HOPS)
    wait_until(lambda: samples_of(asker, "r") == (BUSY, HOPS))
    news = [(BUSY,), (BUSY, HOPS)]
    assert all(samples in (news, news[1:]) for samples in told.values())

    directory.close()
    cluster.endpoint += "2"
    cluster.serve()
    wait_until(lambda: samples_of(asker, "r") == (BUSY, HOPS))


@pytest.mark.parametrize("bad", [[BUSY] * (MAX_SAMPLES + 1), [BUSY._replace(value=np.nan)], None])
def test_a_failing_source_costs_no_membership(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, bad: list[Sample] | None
) -> None:
    cluster.serve()
    asked, good = [0], threading.Event()

    def source() -> list[Sample]:
        asked[0] += 1
        if good.is_set():
            return [BUSY]
        if bad is None:
            raise RuntimeError("a bug of the owner")
        return bad

    member = cluster.add("r", "router", source)
    wait_until(lambda: asked[0] >= 3)
    wait_until(lambda: samples_of(member, "r") == ())
    failures = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [record.getMessage() for record in failures] == ["samples cannot be told"]
    good.set()
    wait_until(lambda: samples_of(member, "r") == (BUSY,))


def test_a_member_that_closes_has_not_died_one_that_breaks_off_has(cluster: Cluster) -> None:
    directory = cluster.serve()
    asker, router = cluster.add("i", "ingress"), cluster.add("r", "router")
    lost = connect(cluster.endpoint, SECRET)
    lost.send(encode(register("lost", "attention")))
    wait_until(lambda: samples_of(asker, "lost") is not None)
    lost.close()
    wait_until(lambda: samples_of(asker, "lost") is None)
    assert samples_of(asker, "r") == ()
    router.close()
    asker.close()
    wait_until(lambda: not directory.snapshot.workers)
    assert directory.counters.deaths == {"attention": 1, "router": 0, "experts": 0, "ingress": 0}


def test_an_answer_that_cannot_be_sent_is_an_error_of_the_channel(tmp_path: Path) -> None:
    endpoint, joined = f"unix:{tmp_path}/d.sock", threading.Event()

    def handle(frame: Frame, connection: Connection) -> Frame | None:
        joined.set()
        if isinstance(decode(frame), MetricsRequest):
            return reply_to(frame, status=Status.FAILED, text="bad reply: body_bytes")
        return None

    server = Server(endpoint, handle, SECRET)
    server.start()
    registers = register("i", "ingress")
    client = DirectoryClient(lambda: endpoint, SECRET, registers, ping_interval_s=PATIENCE_S)
    client.start()
    assert joined.wait(PATIENCE_S)
    with pytest.raises(ChannelError, match="bad reply: body_bytes"):
        client.ask_metrics(PATIENCE_S)
    client.close()
    server.close()


def test_asking_for_metrics_without_a_directory_fails_at_once() -> None:
    client = DirectoryClient(lambda: "inproc:nobody", SECRET, register("i", "ingress"))
    client.start()
    with pytest.raises(ChannelClosed, match="no line to the directory"):
        client.ask_metrics(PATIENCE_S)
    client.close()
