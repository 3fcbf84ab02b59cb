import json

import pytest
from pydantic import BaseModel, ValidationError

from experts.channel.frame import Frame, Kind
from experts.messages import (
    Assign,
    Holding,
    MessageError,
    Ping,
    Pong,
    Register,
    Snapshot,
    WorkerInfo,
    decode,
    encode,
)

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
EVERY_KIND = [
    REGISTER,
    Assign(epoch=1, experts=[(1, 0), (1, 1)]),
    Holding(epoch=1, experts=[]),
    SNAPSHOT,
    Ping(),
    Pong(),
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
