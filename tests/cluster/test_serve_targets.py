"""What Serve's autoscaler wants is told when it changes; on Ray: test_scaling.py."""

from __future__ import annotations

import logging
from queue import Queue

import pytest

from cluster.serve_targets import Targets, TargetWatch

TIMEOUT_S = 60.0


def test_a_target_is_told_when_it_changes_and_stays_while_nobody_knows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers: Queue[Targets | Exception] = Queue()
    told: Queue[Targets] = Queue()

    def ask() -> Targets:
        answer = answers.get(timeout=TIMEOUT_S)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with caplog.at_level(logging.WARNING):
        watch = TargetWatch(ask, told.put, every_s=0.0)
        for number in (2, 2, 3, 3):
            answers.put({"experts": number})
        for _ in range(3):
            answers.put(TimeoutError("no controller"))
        for number in (3, 2):
            answers.put({"experts": number})
        changes = [told.get(timeout=TIMEOUT_S) for _ in range(3)]
        watch.close()
        answers.put({})  # the question that is under way
    assert changes == [{"experts": 2}, {"experts": 3}, {"experts": 2}]
    assert [record.getMessage() for record in caplog.records] == [
        "Serve's targets are not known: TimeoutError: no controller"
    ]
