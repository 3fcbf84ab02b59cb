"""Ray's messages in the terminal: a line a death, nothing else, and Ray still prints that way."""

from __future__ import annotations

import logging
import warnings

import pytest

from cluster import ray_messages

DEATH = (
    "A worker died or was killed while executing a task by an unexpected system error. To "
    "troubleshoot the problem, check the logs. Worker PID: 28888 Worker exit type: SYSTEM_ERROR"
)
CUT_OFF = "Task ServeController.listen_for_change failed. There are infinite retries remaining"


def test_a_death_is_one_line_and_the_rest_is_not_shown(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "cluster.ray_messages"):
        ray_messages.show({"lines": [DEATH, CUT_OFF], "pid": "raylet", "is_err": False})
    shown = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert shown == ["process 28888 died, another one is being started"]
    assert len(caplog.records) == 2
    assert capsys.readouterr() == ("", "")


def test_ray_prints_through_the_function_that_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its listener of errors, which has only private names, on one message of a subscriber."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray._private.worker as ray_worker

    class Subscriber:
        def subscribe(self) -> None: ...

        def poll(self) -> tuple[None, dict[str, object]]:
            stopped.count += 1
            return None, {"job_id": None, "error_message": DEATH}

    class Stopped:
        count = 0

        def is_set(self) -> bool:
            return self.count > 0

    class Worker:
        gcs_error_subscriber = Subscriber()

        class current_job_id:
            binary = staticmethod(lambda: b"")

    stopped = Stopped()
    monkeypatch.setattr(ray_worker, "print_to_stdstream", ray_worker.print_to_stdstream)
    monkeypatch.setattr(ray_worker, "_internal_kv_initialized", lambda: False)
    ray_messages.tame()
    ray_worker.listen_error_messages(Worker(), stopped)  # type: ignore[arg-type]
    assert "process 28888 died" in caplog.text
