import json

import pytest
from pydantic import BaseModel, ValidationError

from experts.channel.frame import Frame, Kind
from experts.messages import (
    MAX_SAMPLES,
    Assign,
    Chaos,
    ClusterLoadReply,
    Done,
    Drain,
    Holding,
    Leave,
    LoadReport,
    LoadRequest,
    MessageError,
    MetricsReply,
    MetricsReport,
    MetricsRequest,
    Ping,
    Pong,
    Rebalance,
    Register,
    Released,
    Replicate,
    Scale,
    Signal,
    Snapshot,
    WorkerInfo,
    WorkerRows,
    WorkerSamples,
    decode,
    encode,
)
from experts.metrics import Sample

INFO = {"worker_id": "experts-0", "role": "experts", "endpoint": "unix:/tmp/e0", "pid": 7}
REGISTER = Register(**INFO, node="n1", num_slots=4, holds=[(1, 0)], seen_epoch=3, seen_version=9)
SNAPSHOT = Snapshot(
    version=2,
    epoch=1,
    ready=False,
    stage="loading experts 1/2 on 1 workers",
    workers=[REGISTER.info],
    holders={"1": [["experts-0"], []]},
)
SAMPLE = Sample("shoal_hop_seconds_bucket", (("part", "wire"), ("le", "0.001")), 2.5)
EVERY_KIND = [
    REGISTER,
    Assign(epoch=1, experts=[(1, 0), (1, 1)]),
    Holding(epoch=1, experts=[]),
    SNAPSHOT,
    Ping(),
    Pong(),
    LoadReport(window_s=60.0, rows=bytes(range(256)), recent_s=5.0, recent_rows=b""),
    LoadRequest(),
    ClusterLoadReply(
        epoch=4,
        window_s=60.0,
        recent_s=5.0,
        layers=[1, 2],
        rows=[[0, 7], [3, 1]],
        recent_rows=[[0, 1], [0, 1]],
        workers=[WorkerRows(worker_id="experts-0", rows=[7, 4], recent_rows=[1, 1])],
    ),
    MetricsReport(samples=[SAMPLE, Sample("shoal_hedges_total", (), 3)]),
    MetricsRequest(),
    MetricsReply(
        workers=[
            WorkerSamples(worker_id="placement", role="placement", samples=[]),
            WorkerSamples(worker_id="experts-0", role="experts", samples=[SAMPLE]),
        ]
    ),
    REGISTER.model_copy(update={"spare_slots": 2, "seen_scale": {"experts": 3}}),
    SNAPSHOT.model_copy(update={"scale": {"experts": 3, "attention": 1}}),
    REGISTER.model_copy(update={"drained": True}),
    SNAPSHOT.model_copy(update={"drained": ("experts-0",)}),
    Leave(),
    Released(),
    Drain(worker_id="experts-0"),
    Replicate(layer=1, expert=3, replicas=2),
    Rebalance(),
    Scale(role="experts", workers=4),
    Scale(role="attention", workers=None),
    Chaos(action="kill", role="experts", worker_id="experts-0", duration_s=1.0),
    Chaos(action="stop", role="router", worker_id=None, duration_s=30.0),
    Done(text="moved 4 experts"),
    Signal(action="stop", duration_s=30.0),
]


@pytest.mark.parametrize("message", EVERY_KIND, ids=lambda m: m.type)
def test_what_is_encoded_is_decoded_again(message: BaseModel) -> None:
    frame = encode(message)
    assert frame.kind is Kind.CONTROL
    assert json.loads(frame.body)["type"] == message.type  # type: ignore[attr-defined]
    assert decode(frame) == message


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        SNAPSHOT.ready = True  # type: ignore[misc]


def test_snapshot_answers_who_holds_and_who_lives() -> None:
    assert SNAPSHOT.holders_of(1) == (("experts-0",), ())
    assert SNAPSHOT.holders_of(5) == ()
    assert SNAPSHOT.workers_of("experts") == (WorkerInfo(**INFO, node="n1", num_slots=4),)
    assert SNAPSHOT.workers_of("router") == ()


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"", "body: Invalid JSON"),
        (b"\xff\xfe", "body: Invalid JSON"),
        (b"[]", "body: Input should be"),
        (b'{"type":"shutdown"}', "body: Input tag"),
        (b'{"type":"ping","extra":1}', "ping.extra: Extra inputs"),
        (b'{"type":"assign","epoch":-1,"experts":[]}', "assign.epoch: "),
        (b'{"type":"assign","epoch":"1","experts":[]}', "assign.epoch: "),
        (b'{"type":"assign","epoch":1,"experts":[[1]]}', "assign.experts.0.1: Field required"),
        (b'{"type":"assign","epoch":1,"experts":[[1,70000]]}', "assign.experts.0.1: "),
        (b'{"type":"holding","epoch":1}', "holding.experts: Field required"),
        (b'{"type":"load_report","window_s":60}', "load_report.rows: Field required"),
        (b'{"type":"load_report","window_s":0,"rows":[]}', "load_report.window_s: "),
        (b'{"type":"load_report","window_s":1e999,"rows":[]}', "load_report.window_s: "),
        (b'{"type":"load_report","window_s":60,"rows":[[1]]}', "load_report.rows: "),
        (b'{"type":"load_report","window_s":60,"rows":"%"}', "load_report.rows: "),
        (b'{"type":"metrics_report","samples":[["a"]]}', "metrics_report.samples.0.1: "),
        (b'{"type":"metrics_report","samples":[["a b",[],1]]}', "metrics_report.samples.0.0: "),
        (b'{"type":"metrics_report","samples":[["a",[],"1"]]}', "metrics_report.samples.0.2: "),
        (b'{"type":"metrics_report","samples":[["a",[],1e999]]}', "metrics_report.samples.0.2: "),
        (
            b'{"type":"metrics_report","samples":[["a",[["b",2]],1]]}',
            "metrics_report.samples.0.1.0.1: ",
        ),
        (
            b'{"type":"metrics_report","samples":[["a",[["1","x"]],1]]}',
            "metrics_report.samples.0.1.0.0: ",
        ),
        (b'{"type":"metrics_request","of":"me"}', "metrics_request.of: Extra inputs"),
        (b'{"type":"load_request","of":"me"}', "load_request.of: Extra inputs"),
        (b'{"type":"drain","worker_id":""}', "drain.worker_id: "),
        (b'{"type":"replicate","layer":1,"expert":1,"replicas":0}', "replicate.replicas: "),
        (b'{"type":"replicate","layer":1,"expert":-1,"replicas":1}', "replicate.expert: "),
        (b'{"type":"scale","role":"router","workers":1}', "scale.role: "),
        (b'{"type":"scale","role":"experts"}', "scale.workers: Field required"),
        (b'{"type":"scale","role":"experts","workers":4097}', "scale.workers: "),
        (
            b'{"type":"chaos","action":"burn","role":"experts","worker_id":null,"duration_s":1}',
            "chaos.action: ",
        ),
        (b'{"type":"signal","action":"stop","duration_s":1e9}', "signal.duration_s: "),
        (b'{"type":"rebalance","moves":3}', "rebalance.moves: Extra inputs"),
        (
            json.dumps({"type": "register", **INFO, "node": "n", "seen_scale": {"x": 1}}).encode(),
            "register.seen_scale.x",
        ),
        (
            json.dumps({"type": "register", **INFO, "node": "n", "worker_id": "a\nb"}).encode(),
            "register.worker_id: ",
        ),
    ],
)
def test_bad_bodies_are_refused_in_one_line(body: bytes, place: str) -> None:
    with pytest.raises(MessageError) as caught:
        decode(Frame(kind=Kind.CONTROL, body=body))
    text = str(caught.value)
    assert text.startswith(f"control message: {place}")
    assert "\n" not in text and len(text) < 400


def test_hostile_values_do_not_reach_the_error_text() -> None:
    body = json.dumps({"type": "register", **INFO, "node": "n", "role": "x" * 5000}).encode()
    with pytest.raises(MessageError) as caught:
        decode(Frame(kind=Kind.CONTROL, body=body))
    assert "xxxx" not in str(caught.value)


def test_a_batch_frame_is_not_a_message() -> None:
    with pytest.raises(MessageError, match="EXPERT_BATCH, expected CONTROL"):
        decode(Frame(kind=Kind.EXPERT_BATCH))


def test_load_of_v3_is_a_small_message() -> None:
    """58 layers of 256 experts: a third of a megabyte a second and worker."""
    rows = bytes(58 * 256 * 8)
    report = LoadReport(window_s=60.0, rows=rows, recent_s=5.0, recent_rows=rows)
    assert len(encode(report).body) < 320_000


def test_a_member_tells_a_bounded_number_of_samples() -> None:
    most = [SAMPLE] * MAX_SAMPLES
    assert MetricsReport(samples=most).samples[-1].labels == (("part", "wire"), ("le", "0.001"))
    for samples in ([*most, SAMPLE], [SAMPLE._replace(labels=SAMPLE.labels * 5)]):
        with pytest.raises(ValidationError):
            MetricsReport(samples=samples)
