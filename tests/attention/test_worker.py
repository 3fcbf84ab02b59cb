"""Worker and client over real channels: outputs, aborts, lost connections, faults."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from torch import Tensor

from attention.build import build_engine
from attention.client import AttentionClient
from attention.config import AttentionConfig
from attention.messages import (
    Abort,
    SamplingParams,
    StepOutputs,
    Submit,
    TokenOutput,
    encode_message,
    parse_message,
)
from attention.worker import AttentionWorker
from experts.channel.channel import ChannelClosed, connect
from experts.channel.frame import Frame, FrameLimits, Kind, Status
from router.times import HopTimes
from tests.attention.harness import GREEDY, Answers, Rig, submit
from tests.reference import prompts

SECRET = b"a secret of the tests"
WAIT_S = 60.0
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)
ROOM = {"num_kv_blocks": 640}  # for all that the model's context takes of it
RigOf = Callable[[str], Rig]
_names = itertools.count()


class Gate:
    """A MoE client that waits at `begin` while closed: holds the engine inside a step."""

    def __init__(self, moe: Any):
        self.moe = moe
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()
        self.error: Exception | None = None

    @property
    def num_renormalised(self) -> int:
        return self.moe.num_renormalised

    @property
    def hop_times(self) -> HopTimes:
        return self.moe.hop_times

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Any:
        self.reached.set()
        if not self.open.wait(WAIT_S):
            raise TimeoutError("nobody opened the gate")
        if self.error is not None:
            raise self.error
        return self.moe.begin(layer, x, deadline_s)

    def finish(self, ticket: Any) -> Tensor:
        return self.moe.finish(ticket)


class Served:
    """A worker on an endpoint, and clients of it."""

    def __init__(self, rig: Rig, folder: Path, **settings: Any):
        self.gate = Gate(rig.pool.router())
        config = {"num_kv_blocks": 64, "block_size": 4, "max_num_seqs": 4} | settings
        self.worker = AttentionWorker(rig.checkpoint, self.gate, AttentionConfig(**config))
        self.endpoint = self.worker.start(f"unix:{folder}/worker-{next(_names)}", SECRET)
        self.clients: list[AttentionClient] = []

    def client(self) -> AttentionClient:
        self.clients.append(AttentionClient(self.endpoint, SECRET, WAIT_S))
        return self.clients[-1]

    def close(self) -> None:
        self.gate.open.set()
        for client in self.clients:
            client.close()
        self.worker.close()


class Inbox:
    """Outputs of one request, waited for."""

    def __init__(self) -> None:
        self._queue: queue.Queue[TokenOutput] = queue.Queue()

    def __call__(self, output: TokenOutput) -> None:
        self._queue.put(output)

    def next(self) -> TokenOutput:
        return self._queue.get(timeout=WAIT_S)

    def all(self) -> list[TokenOutput]:
        outputs = [self.next()]
        while outputs[-1].finish_reason is None:
            outputs.append(self.next())
        return outputs


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.fixture
def serve(rig: RigOf, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    served: list[Served] = []

    def start(**settings: Any) -> Served:
        served.append(Served(rig("v2-lite"), tmp_path, **settings))
        return served[-1]

    yield start
    for each in served:
        each.close()


def wait_idle(served: Served) -> Any:
    """Statistics once every request has ended; nothing tells of a lost connection's, so look."""
    patience = threading.Event()
    for _ in range(12_000):
        stats = served.worker.engine.stats()
        num_ended = stats.requests_finished + stats.requests_aborted + stats.requests_failed
        if num_ended == stats.requests_received:
            return stats
        patience.wait(0.005)
    raise AssertionError(f"{num_ended} of {stats.requests_received} ended")


def test_two_clients_get_their_own_tokens(serve: Callable[..., Served], rig: RigOf) -> None:
    served = serve()
    clients, inboxes = [served.client(), served.client()], {}
    for index, ids in enumerate(prompts()):
        inboxes[index] = Inbox()
        clients[index % 2].submit(submit(f"r{index}", ids), inboxes[index])
    direct = Answers(
        rig("v2-lite").engine(), [submit(f"r{i}", ids) for i, ids in enumerate(prompts())]
    ).run()
    for index, inbox in inboxes.items():
        outputs = inbox.all()
        assert tokens(outputs) == direct.tokens(f"r{index}")
        assert outputs[-1].finish_reason == "length"


def test_abort_ends_a_request_with_a_last_word(serve: Callable[..., Served]) -> None:
    served, inbox = serve(**ROOM), Inbox()
    client = served.client()
    client.submit(submit("a", [20], ENDLESS), inbox)
    inbox.next()
    client.abort("a")
    client.abort("unknown")
    assert inbox.all()[-1].finish_reason == "abort"
    stats = wait_idle(served)
    assert stats.requests_aborted == 1
    assert stats.kv_blocks_free == stats.kv_blocks_total


def test_a_lost_connection_aborts_its_requests_only(serve: Callable[..., Served]) -> None:
    served, lost, kept = serve(**ROOM), Inbox(), Inbox()
    leaving, staying = served.client(), served.client()
    leaving.submit(submit("a", [20], ENDLESS), lost)
    staying.submit(submit("b", [21], GREEDY), kept)
    lost.next()
    leaving.close()
    assert lost.all()[-1].finish_reason == "lost"
    assert kept.all()[-1].finish_reason == "length"
    stats = wait_idle(served)
    assert (stats.requests_aborted, stats.requests_finished) == (1, 1)
    assert stats.kv_blocks_free == stats.kv_blocks_total


def test_a_client_that_does_not_read_stops_nobody_else(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention.worker.SEND_TIMEOUT_S", 10 * WAIT_S)
    served, inbox = serve(**ROOM), Inbox()
    with closing(connect(served.endpoint, SECRET)) as hung:
        endless = encode_message(submit("a", [20], ENDLESS))
        hung.send(Frame(Kind.CONTROL, body=endless), WAIT_S)
        hung.receive(WAIT_S)  # its answer has begun
        (peer,) = served.worker._peers.values()
        for _ in range(4):  # its buffer is full from here on
            peer.outbox.post(Frame(Kind.CONTROL, body=b" " * 2**22))
        served.client().submit(submit("b", [21]), inbox)
        assert inbox.all()[-1].finish_reason == "length"
    assert wait_idle(served).requests_aborted == 1


def test_another_connection_cannot_abort(serve: Callable[..., Served]) -> None:
    served, mine = serve(), Inbox()
    owner, other = served.client(), served.client()
    served.gate.open.clear()
    owner.submit(submit("a", [20]), mine)
    assert served.gate.reached.wait(WAIT_S)
    other.abort("a")
    other.stats(WAIT_S)  # the abort was taken in before
    served.gate.open.set()
    assert mine.all()[-1].finish_reason == "length"


def test_a_replay_over_a_new_connection_takes_over(
    serve: Callable[..., Served], rig: RigOf
) -> None:
    """The worker stood still, its client came back before the end of the old line was noticed."""
    served, lost, replayed = serve(), Inbox(), Inbox()
    old, new = served.client(), served.client()
    served.gate.open.clear()
    old.submit(submit("a", [20], ENDLESS), lost)
    assert served.gate.reached.wait(WAIT_S)
    new.submit(submit("a", [20]), replayed)
    new.stats(WAIT_S)  # the submit was taken in before
    served.gate.open.set()
    outputs = replayed.all()
    assert tokens(outputs) == Answers(rig("v2-lite").engine(), [submit("a", [20])]).run().tokens(
        "a"
    )
    assert outputs[-1].finish_reason == "length"
    old.close()
    assert [o.finish_reason for o in lost.all() if o.finish_reason] == ["lost"]
    stats = wait_idle(served)
    assert (stats.requests_aborted, stats.requests_finished) == (1, 1)
    assert stats.kv_blocks_free == stats.kv_blocks_total


class FakeLine:
    """A connection whose thread is the test."""

    peer, closed = "test", False

    def __init__(self, worker: AttentionWorker):
        self._worker = worker
        self.outputs: list[TokenOutput] = []
        worker._connection_opened(self)  # type: ignore[arg-type]

    def submit(self, request: Submit) -> None:
        frame = Frame(Kind.CONTROL, body=encode_message(request))
        assert self._worker.handle(frame, self) is None  # type: ignore[arg-type]

    def abort(self, name: str) -> None:
        frame = Frame(Kind.CONTROL, body=encode_message(Abort(request_id=name)))
        assert self._worker.handle(frame, self) is None  # type: ignore[arg-type]

    def end(self) -> None:
        self._worker._connection_lost(self)  # type: ignore[arg-type]

    def takes_at_once(self, frame: Frame) -> bool:
        return True

    def send(self, frame: Frame, timeout_s: float) -> None:
        message = parse_message(frame.body)
        assert isinstance(message, StepOutputs)
        self.outputs += message.outputs

    def ends(self) -> list[str]:
        return [o.error or o.finish_reason for o in self.outputs if o.finish_reason]


@pytest.fixture
def idle_worker(rig: RigOf) -> AttentionWorker:
    """Its engine thread is the test."""
    each = rig("v2-lite")
    return AttentionWorker(each.checkpoint, each.pool.router(), AttentionConfig(num_kv_blocks=64))


def work_off(worker: AttentionWorker, steps: int = 1000) -> None:
    """Take in what lies there at once, then steps until nothing is left."""
    while steps and (worker._inbox or worker.engine.has_work):
        worker._receive()
        worker._deliver(worker.engine.step())
        steps -= 1


A = submit("a", [20])
OVER = submit("a", [20], emitted_ids=[21] * 12)


@pytest.mark.parametrize(
    "story",
    [
        "old: submit, step, old: end, new: submit",
        "old: submit, step, new: submit, old: end",
        "old: submit, step, new: submit, step, old: end",
        "old: submit, old: end, new: submit",
        "old: submit, new: submit, old: end",
        "new: submit, old: submit, old: end",
        "old: over, old: end, new: submit",
        "old: over, new: submit, old: end",
    ],
)
def test_the_newest_connection_has_the_request(story: str, idle_worker: AttentionWorker) -> None:
    """What lies between two steps is taken in at once, as after a stop."""
    lines = {name: FakeLine(idle_worker) for name in ("old", "new")}
    for act in story.split(", "):
        if act == "step":
            work_off(idle_worker, steps=1)
            continue
        name, deed = act.split(": ")
        if deed == "end":
            lines[name].end()
        else:
            lines[name].submit(A if deed == "submit" else OVER)
    work_off(idle_worker)
    assert lines["new"].ends() == ["length"]
    assert len(tokens(lines["new"].outputs)) == 12
    assert set(lines["old"].ends()) <= {"the request id is in use"}
    stats = idle_worker.engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert idle_worker._owners == {}


def test_an_open_id_is_not_started_again_on_its_connection(idle_worker: AttentionWorker) -> None:
    line = FakeLine(idle_worker)
    line.submit(A)
    line.submit(A)
    work_off(idle_worker)
    assert line.ends() == ["the request id is in use", "length"]
    assert len(tokens(line.outputs)) == 12


def test_an_aborted_id_may_be_used_again_at_once(idle_worker: AttentionWorker) -> None:
    line = FakeLine(idle_worker)
    line.submit(A)
    work_off(idle_worker, steps=1)
    line.abort("a")
    line.submit(A)
    work_off(idle_worker)
    assert line.ends() == ["abort", "length"]


def test_what_comes_of_an_ended_connection_is_not_started(idle_worker: AttentionWorker) -> None:
    line = FakeLine(idle_worker)
    line.end()
    line.submit(A)
    work_off(idle_worker)
    assert idle_worker.engine.stats().requests_received == 0


def test_the_worker_outlives_a_fault_of_the_experts(serve: Callable[..., Served]) -> None:
    served, failed, fine = serve(), Inbox(), Inbox()
    client = served.client()
    served.gate.error = RuntimeError("broken")
    client.submit(submit("a", [20]), failed)
    assert failed.all()[-1].error == "the model failed"
    served.gate.error = None
    client.submit(submit("b", [20]), fine)
    assert fine.all()[-1].finish_reason == "length"
    assert client.stats(WAIT_S).step_errors == 1


def test_a_worker_that_goes_away_loses_its_requests(serve: Callable[..., Served]) -> None:
    served, inbox, late = serve(**ROOM), Inbox(), Inbox()
    client = served.client()
    client.submit(submit("a", [20], ENDLESS), inbox)
    inbox.next()
    served.worker.close()
    assert inbox.all()[-1].finish_reason == "lost"
    client.submit(submit("b", [20]), late)
    assert late.next().finish_reason == "lost"
    assert client.closed
    with pytest.raises(ChannelClosed):
        client.stats(WAIT_S)


def test_closing_loses_requests_at_once_even_while_a_step_hangs(
    serve: Callable[..., Served],
) -> None:
    served, inbox = serve(), Inbox()
    served.gate.open.clear()
    served.client().submit(submit("a", [20]), inbox)
    assert served.gate.reached.wait(WAIT_S)
    closing = threading.Thread(target=served.worker.close)
    closing.start()
    assert inbox.all()[-1].finish_reason == "lost"
    served.gate.open.set()
    closing.join()


def test_stats_answer_while_a_step_hangs(serve: Callable[..., Served]) -> None:
    served, inbox = serve(max_num_seqs=1), Inbox()
    client = served.client()
    served.gate.open.clear()
    client.submit(submit("a", [20] * 9), inbox)
    client.submit(submit("b", [20] * 5), inbox)
    assert served.gate.reached.wait(WAIT_S)
    stats = client.stats(WAIT_S)
    assert (stats.num_running, stats.block_size, stats.max_model_len) == (1, 4, 256)
    assert stats.kv_blocks_free == stats.kv_blocks_total - 3


def test_a_listener_that_raises_does_not_hurt_the_others(serve: Callable[..., Served]) -> None:
    served, inbox = serve(), Inbox()
    client = served.client()

    def bad(_output: TokenOutput) -> None:
        raise RuntimeError("listener")

    client.submit(submit("bad", [20]), bad)
    client.submit(submit("good", [21]), inbox)
    assert inbox.all()[-1].finish_reason == "length"


def test_an_answer_that_fits_no_frame_ends_with_an_error(serve: Callable[..., Served]) -> None:
    """128 logprobs for each of 200 tokens are some 700 kB; this peer takes 20 kB."""
    served, small = serve(), Inbox()
    limits = FrameLimits(max_body_bytes=20_000)
    raw = connect(served.endpoint, SECRET, limits, WAIT_S)
    request = submit("large", [20] * 200, SamplingParams(max_tokens=0, prompt_logprobs=128))
    raw.send(Frame(Kind.CONTROL, body=encode_message(request)), WAIT_S)
    answer = parse_message(raw.receive(WAIT_S).body)
    assert isinstance(answer, StepOutputs)
    assert answer.outputs[0].error == "the answer is too large to send"
    raw.close()
    served.client().submit(submit("small", [20]), small)
    assert small.all()[-1].finish_reason == "length"


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"type":"submit"}', b'{"type":"stats","x":1}', b"\xff", b"[" * 5000]
)
def test_a_bad_message_is_refused_and_the_connection_lives(
    body: bytes, serve: Callable[..., Served]
) -> None:
    served = serve()
    raw = connect(served.endpoint, SECRET, timeout_s=WAIT_S)
    raw.send(Frame(Kind.CONTROL, body=body), WAIT_S)
    assert raw.receive(WAIT_S).status == Status.FAILED
    raw.send(Frame(Kind.CONTROL, request_id=7, body=b'{"type":"stats"}'), WAIT_S)
    answer = raw.receive(WAIT_S)
    assert (answer.status, answer.request_id) == (Status.OK, 7)
    raw.close()


def test_messages_survive_the_wire() -> None:
    params = SamplingParams(
        max_tokens=3, logit_bias={5: -1.5}, stop_token_ids=(1, 2), allowed_token_ids=(4, 5), seed=-9
    )
    request = Submit(request_id="a", prompt_ids=[1, 2], params=params, emitted_ids=[3])
    assert parse_message(encode_message(request)) == request
    assert parse_message(encode_message(Abort(request_id="a"))) == Abort(request_id="a")


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": 2.0},
        {"max_tokens": -1},
        {"repetition_penalty": 0.0},
        {"seed": 2**64},
        {"logprobs": 129},
        {"logit_bias": {-1: 1.0}},
        {"unknown": 1},
    ],
)
def test_parameters_out_of_bounds_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingParams(**fields)


def test_sizes_follow_from_config_and_model(rig: RigOf) -> None:
    v2lite = rig("v2-lite")  # 4 layers of 80 float32 values: 1,280 bytes a token
    settings = AttentionConfig(kv_cache_bytes=1280 * 16 * 7 + 5, block_size=16)
    stats = build_engine(v2lite.checkpoint, v2lite.pool.router(), settings).stats()
    assert (stats.kv_blocks_total, stats.block_size, stats.max_model_len) == (7, 16, 112)
    with pytest.raises(ValidationError, match="less than max_num_seqs"):
        AttentionConfig(max_num_batched_tokens=8, max_num_seqs=9)
