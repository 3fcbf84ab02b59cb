"""`shoal experts`, `shoal scale`, `shoal chaos` against a real HTTP server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from cluster.frontend.expert_load import LoadWatch
from cluster.frontend.operations import Operations
from cluster.operations_cli import chaos_app, experts_app, scale
from experts.channel.channel import ChannelClosed
from experts.messages import (
    Chaos,
    ClusterLoadReply,
    Command,
    CommandRefused,
    Drain,
    Rebalance,
    Replicate,
    Scale,
    Snapshot,
    WorkerInfo,
    WorkerRows,
)
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import EOS, http_server, make_service

REPLY = ClusterLoadReply(
    epoch=6,
    window_s=60.0,
    recent_s=5.0,
    layers=(1, 2),
    rows=((30, 10), (0, 0)),
    recent_rows=((3, 1), (0, 0)),
    workers=(
        WorkerRows(worker_id="e0", rows=(10, 0), recent_rows=(1, 0)),
        WorkerRows(worker_id="e1", rows=(30, 0), recent_rows=(3, 0)),
    ),
)
WORKERS = tuple(
    WorkerInfo(worker_id=name, role=role, endpoint="", pid=1, node="n")  # type: ignore[arg-type]
    for name, role in {"e0": "experts", "e1": "experts", "a0": "attention"}.items()
)
SNAPSHOT = Snapshot(
    version=9,
    epoch=5,
    ready=True,
    stage="ready",
    workers=WORKERS,
    holders={"1": (("e0", "e1"), ("e1",)), "2": ((), ("e0",))},
)


def shoal_app() -> typer.Typer:
    app = typer.Typer()
    app.add_typer(experts_app, name="experts")
    app.command()(scale)
    app.add_typer(chaos_app, name="chaos")
    return app


class Shoal:
    """A server whose directory is fake, and the command line."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.commands: list[Command] = []
        self.error: Exception | None = None
        self.url = stack.enter_context(
            http_server(
                make_service(folder, FakeEngine([EOS])),
                LoadWatch("tiny", self._load, lambda: SNAPSHOT),
                Operations(self._command, lambda: SNAPSHOT),
                {"workers": [worker.model_dump() for worker in WORKERS]},
            )
        )

    def _command(self, command: Command) -> str:
        self.commands.append(command)
        if self.error is not None:
            raise self.error
        return "moved 4 experts"

    def _load(self) -> ClusterLoadReply:
        if self.error is not None:
            raise self.error
        return REPLY

    def __call__(self, *args: str) -> Result:
        return CliRunner().invoke(shoal_app(), [*args, "--url", self.url])


@pytest.fixture
def shoal(tmp_path: Path) -> Iterator[Shoal]:
    with ExitStack() as stack:
        yield Shoal(tmp_path, stack)


@pytest.mark.parametrize(
    ("args", "command"),
    [
        ("experts drain e1", Drain(worker_id="e1")),
        ("experts replicate 1:1", Replicate(layer=1, expert=1, replicas=2)),
        ("experts replicate 1:0 --replicas 1", Replicate(layer=1, expert=0, replicas=1)),
        ("experts rebalance", Rebalance()),
        ("scale experts 4", Scale(role="experts", workers=4)),
        ("scale attention auto", Scale(role="attention", workers=None)),
        (
            "chaos kill expert --random",
            Chaos(action="kill", role="experts", worker_id=None, duration_s=30),
        ),
        (
            "chaos stop expert --worker e1 --for 2",
            Chaos(action="stop", role="experts", worker_id="e1", duration_s=2),
        ),
        (
            "chaos kill attention",
            Chaos(action="kill", role="attention", worker_id="a0", duration_s=30),
        ),
    ],
)
def test_commands(shoal: Shoal, args: str, command: Command) -> None:
    result = shoal(*args.split())
    assert (result.exit_code, result.stdout) == (0, "moved 4 experts\n")
    assert shoal.commands == [command]


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        ("experts drain e9", 2, "shoal: There is no expert worker 'e9'; there are: e0, e1."),
        ("experts replicate 1", 2, "shoal: '1' is not LAYER:EXPERT"),
        ("experts replicate 1:x", 2, "shoal: '1:x' is not LAYER:EXPERT"),
        ("experts replicate 1:9", 2, "shoal: Invalid 'expert': 9 is too large"),
        ("experts replicate 1:1 --replicas 0", 2, "shoal: Invalid 'replicas': 0 is too small"),
        ("scale experts few", 2, "shoal: 'few' is neither a number of workers nor auto"),
        ("scale router 2", 2, "'router' is not one of"),
        ("scale experts 0", 2, "shoal: Invalid 'workers': 0 is too small"),
        ("chaos kill ingress", 2, "'ingress' is not one of"),
        ("chaos kill expert --random --worker e0", 2, "shoal: give either --worker or --random"),
        (
            "chaos kill expert",
            2,
            "shoal: there are 2 expert workers, give --worker ID or --random: e0, e1",
        ),
        ("chaos stop router", 2, "shoal: there is no router worker"),
        ("chaos stop expert --random --for 9999", 2, "shoal: Invalid 'for_s'"),
    ],
)
def test_bad_commands_are_one_line_and_exit_2(
    shoal: Shoal, args: str, code: int, text: str
) -> None:
    result = shoal(*args.split())
    assert result.exit_code == code
    assert text in result.stderr and "Traceback" not in result.stderr
    if text.startswith("shoal:"):
        assert result.stderr.count("\n") == 1
    assert shoal.commands == []


def test_a_refusal_shows_the_directorys_line(shoal: Shoal) -> None:
    shoal.error = CommandRefused("chaos is not enabled")
    result = shoal("chaos", "kill", "attention")
    assert (result.exit_code, result.stderr) == (2, "shoal: chaos is not enabled\n")


def test_a_directory_that_is_away_is_exit_3(shoal: Shoal) -> None:
    shoal.error = ChannelClosed("no line to the directory")
    for args in (("experts", "rebalance"), ("experts", "show")):
        result = shoal(*args)
        assert result.exit_code == 3 and "directory" in result.stderr


def test_no_server_is_exit_3() -> None:
    args = ["scale", "experts", "2", "--url", "http://127.0.0.1:9"]
    result = CliRunner().invoke(shoal_app(), args)
    assert result.exit_code == 3 and "no Shoal at http://127.0.0.1:9" in result.stderr


def test_a_server_without_operations_says_so(tmp_path: Path) -> None:
    with http_server(make_service(tmp_path, FakeEngine([EOS]))) as url:
        result = CliRunner().invoke(shoal_app(), ["scale", "experts", "2", "--url", url])
    assert result.exit_code == 2
    assert "enable_operations" in result.stderr


# ---- experts show


def test_show_names_the_hottest_the_replicas_and_the_holders(shoal: Shoal) -> None:
    result = shoal("experts", "show")
    assert result.exit_code == 0
    title, head, first, second, *workers = [line.split() for line in result.stdout.splitlines()]
    assert " ".join(title) == "tiny: rows of the last 60 s, epoch 5"
    assert head == ["layer", "balance", "hottest", "experts", "replicas", "holders"]
    assert first == ["1", "0.67", "0:", "75%", "1:", "25%", "2", "+", "1", "e0:", "1", "e1:", "2"]
    assert second[:4] == ["2", "1.00", "no", "rows"]
    assert second[4:] == ["1", "+", "0,", "1", "missing", "e0:", "1", "e1:", "0"]
    assert workers == [["worker", "rows", "share"], ["e0", "10", "25%"], ["e1", "30", "75%"]]


def test_show_as_json_is_what_the_server_said(shoal: Shoal) -> None:
    body = json.loads(shoal("experts", "show", "--json").stdout)
    assert [layer["layer"] for layer in body["layers"]] == [1, 2]


@pytest.mark.parametrize("options", [["--json"], []])
def test_watch_ends_cleanly_at_ctrl_c(shoal: Shoal, options: list[str]) -> None:
    # A terminal's Ctrl-C is heard; what starts the tests in the background has it ignored.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = heard + "from cluster.operations_cli import experts_app; experts_app()"
    args = ["show", "--watch", *options, "--url", shoal.url]
    with subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TTY_COMPATIBLE": "1"},  # rich updates as on a terminal
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for _ in range(2):  # the second time a second later
            while "tiny" not in process.stdout.readline():
                assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(TIMEOUT_S) == 130
        assert process.stderr.read() == ""
