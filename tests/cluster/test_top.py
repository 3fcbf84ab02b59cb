"""`shoal top`: what it shows for readings of a server, and its lines against one that is a stub."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import typer
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from cluster.http_client import ApiClient, ApiError
from cluster.top.heat_map import Grid, heat_map
from cluster.top.history import History, changes
from cluster.top.layout import MIN_HEIGHT, Scroll
from cluster.top.reading import Load, Reading, read, read_or_away
from cluster.top.view import line, screen
from cluster.top_cli import top
from tests.fakes import TIMEOUT_S
from tests.shoal_stub import ShoalStub, load_body, make_load, make_status, make_worker

RATES = {
    "window_s": 10.0,
    "generated_tokens_per_s": 123.4,
    "prompt_tokens_per_s": 20.25,
    "requests_per_s": 1.5,
    "requests_running": 3,
    "requests_waiting": 0,
    "ttft_s": {"p50": 0.08, "p99": 1.25},
    "itl_s": {"p50": 0.0081, "p99": 0.012},
    "refused": 2,
    "cancelled": 1,
}
TIERS = {"experts": {"wanted": 3, "present": 2}, "attention": {"wanted": 1, "present": 1}}
COUNTERS = {"replays": 0, "deaths": 1, "moves": 3, "hedges": 5, "preemptions": 0}
BUSY = make_worker("experts-0", busy=0.5, queue=4, rows_per_s=830.0)
STATUS = make_status(
    BUSY, "experts-1", "attention-0", "ingress-0", rates=RATES, tiers=TIERS, counters=COUNTERS
)
LOAD = make_load([[40, 20, 10, 10], [0, 0, 0, 0]])
V3 = make_load([[1] * 256 for _ in range(58)], first_layer=3, workers=8)


def lines_of(
    history: History, width: int = 100, height: int | None = 30, first_layer: int = 0
) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(screen(history, width, height, first_layer))
    return [text.rstrip() for text in console.export_text().splitlines()]


def history_of(status: dict[str, Any] = STATUS, load: Load | None = LOAD) -> History:
    return History(Reading(1000.0, status, load))


# ---- heat map


def rows_of(load: Load, width: int) -> list[str]:
    return [text.plain for text in heat_map(load, width)][2:]


def test_a_bar_says_how_many_times_the_even_share() -> None:
    """Of 80 rows each of 4 experts has 20 if all have as many: 2, 1 and 1/2 times that."""
    busy, idle = rows_of(LOAD, 11)
    assert busy == "0 ▅▄▃▃ 0.50"
    assert idle == "1 ···· 0.50"


def test_an_expert_that_nobody_holds_stands_out() -> None:
    holders = [[[0], [], [0, 1], [1]]] * 2
    assert rows_of(make_load(LOAD.recent_rows, holders), 11)[0] == "0 ▅!▃▃ 0.50"


def test_experts_fold_so_that_the_hottest_shows() -> None:
    """256 experts in 64 columns, 4 to each: expert 201 is in column 50, 128 times the even 2."""
    layer = [1] * 256
    layer[201] = 257
    cells = rows_of(make_load([layer]), 71)[0][2:66]
    assert [column for column, bar in enumerate(cells) if bar == "█"] == [50]
    assert Grid.fit(256, 64) == Grid(256, experts_per_cell=4, cell_width=1)


@pytest.mark.parametrize(
    ("experts", "width", "axis"),
    [
        (4, 13, "0     2"),  # three columns each
        (9, 9, "0     6"),
        (256, 64, "0     24    48    72    96    120   144   168   192   216   240"),
    ],
)
def test_the_axis_numbers_the_experts_below_it(experts: int, width: int, axis: str) -> None:
    assert Grid.fit(experts, width).axis() == axis


def test_the_head_says_what_is_folded_and_which_layers_are_shown() -> None:
    head = heat_map(V3, 80, first=2, num_layers=10)[0].plain
    assert (
        head == "experts  times the even share ▁¼▂½▃1▄2▅4▆8▇16█  hottest of 4  layers 5-14 of 3-60"
    )
    assert heat_map(LOAD, 80)[0].plain == "experts  times the even share ▁¼▂½▃1▄2▅4▆8▇16█"


# ---- screen


@pytest.mark.parametrize("load", [LOAD, V3, None])
@pytest.mark.parametrize("size", [(60, MIN_HEIGHT), (80, 24), (132, 43), (300, 100)])
def test_a_screen_fits_the_terminal(load: Load | None, size: tuple[int, int]) -> None:
    width, height = size
    history = history_of(make_status(*(f"experts-{i}" for i in range(40))), load)
    lines = lines_of(history, width, height)
    assert len(lines) == height and max(map(len, lines)) <= width
    assert lines[-1].startswith("q quit")


@pytest.mark.parametrize("size", [(1, 1), (9, 4), (40, 10)])
def test_a_tiny_terminal_shows_the_beginning(size: tuple[int, int]) -> None:
    width, height = size
    assert lines_of(history_of(load=V3), width, height)[0] == lines_of(history_of(), width, 30)[0]


def test_keys_reach_every_layer() -> None:
    reading = Reading(0.0, STATUS, V3)
    scroll = Scroll.of(reading, 24)
    position, seen = scroll.to(scroll.step("home")), set[str]()
    for _ in range(10):
        shown = lines_of(History(reading), 80, 24, position)
        seen |= {text[:2].strip() for text in shown if re.match(r" ?\d+ [·▁-█]", text)}
        position = scroll.to(position + scroll.step("page down"))
    assert seen == {str(layer) for layer in range(3, 61)}
    assert scroll.to(position + scroll.step("down")) == position == scroll.last
    assert scroll.to(position + scroll.step("home") + scroll.step("up")) == 0
    assert scroll.to(scroll.step("end")) == scroll.last and scroll.step("x") == 0


def test_numbers() -> None:
    assert lines_of(history_of())[:6] == [
        "tiny: ready, epoch 7",
        "tokens   123/s     █                         prompt tokens 20.2/s",
        "requests 1.5/s  3 running, 0 waiting; 2 refused, 1 cancelled",
        "latency  TTFT 80 ms, 1.25 s  ITL 8.1 ms, 12 ms  (p50, p99 of 10 s)",
        "replicas experts 2/3  attention 1/1",
        "so far   replays 0  deaths 1  moves 3  hedges 5  preemptions 0",
    ]


def test_without_metrics_what_has_happened_is_a_dash() -> None:
    status = make_status("experts-0", rates=None, tiers=TIERS, counters=None)
    history = History(Reading(0.0, status, LOAD))
    assert "so far   -" in lines_of(history)
    assert not history.add(Reading(1.0, status, LOAD))


def test_what_is_not_known_is_a_dash() -> None:
    rates = dict.fromkeys(RATES)
    lines = lines_of(history_of(make_status("experts-0", rates=rates)))
    assert lines == lines_of(history_of(make_status("experts-0")))
    assert lines[1].split() == ["tokens", "-/s", "prompt", "tokens", "-/s"]
    assert lines[3] == "latency  TTFT -  ITL -  (p50, p99 of - s)"
    assert any(text.endswith("experts-0 ░░░░░░░░    - queue -") for text in lines)


def test_the_hottest_experts_beside_the_workers() -> None:
    """Expert 0 of layer 0: 40 rows of 80 in 5 s. The ingress computes nothing."""
    lines = lines_of(history_of())
    start = lines.index(next(text for text in lines if text.startswith("hottest")))
    halves = [re.split(r" {2,}(?=workers|experts-\d  |attention)", text) for text in lines[start:]]
    assert halves[:4] == [
        ["hottest experts", "workers"],
        ["0:0        8/s  50% on 0", "experts-0   ████░░░░  50% queue 4 830 rows/s"],
        ["0:1        4/s  25% on 1", "experts-1   ░░░░░░░░    - queue -"],
        ["0:2        2/s  12% on 0", "attention-0 ░░░░░░░░    - queue -"],
    ]
    assert not any("ingress" in text for text in lines)


def test_workers_that_do_not_fit_are_counted() -> None:
    status = make_status(*(f"experts-{i:02}" for i in range(40)))
    lines = lines_of(history_of(status), 100, 30)
    shown = sum("experts-" in text and "queue" in text for text in lines)
    assert any(text.endswith(f"and {40 - shown} more") for text in lines)


def test_a_moment_has_all_layers_and_workers_but_no_keys() -> None:
    status = make_status(*(f"experts-{i:02}" for i in range(40)))
    lines = lines_of(history_of(status, V3), 100, None)
    assert sum("queue" in text for text in lines) == 40
    assert lines[8].startswith(" 3 ") and lines[8 + 57].startswith("60 ")
    assert not any("quit" in text for text in lines)


def test_colours_say_the_same_as_heights_and_can_be_off() -> None:
    written = {}
    for no_color in (False, True):
        console = Console(
            width=80, file=io.StringIO(), force_terminal=True, no_color=no_color,
            color_system="truecolor",
        )  # fmt: skip
        console.print(screen(history_of(), 80, 24))
        written[no_color] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[38;2;215;25;28m" in written[False]
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", written[True])
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", text) for text in written.values()]
    assert plain[0] == plain[1]


# ---- events


def test_who_joined_and_who_left() -> None:
    before = make_status("experts-0", "experts-1")
    after = make_status("experts-1", "experts-2", "experts-3")
    assert list(changes(before, after)) == ["left: experts-0", "joined: experts-2, experts-3"]
    assert list(changes(after, after)) == []


def test_what_else_is_an_event() -> None:
    drained = make_worker("experts-1", drained=True)
    more = {"experts": {"wanted": 4, "present": 2}, "router": {"wanted": 1, "present": 1}}
    counters = COUNTERS | {"moves": 5, "hedges": 9, "deaths": 0}  # deaths: counted anew
    after = make_status(BUSY, drained, "attention-0", "ingress-0", tiers=more, counters=counters)
    after |= {"stage": "experts without a holder: 3"}
    assert list(changes(STATUS, after)) == [
        "drained: experts-1",
        "experts without a holder: 3",
        "experts: 4 wanted, 3 before",
        "moves +2",
    ]


def test_counters_are_not_known_while_the_directory_is_away() -> None:
    away = STATUS | {"tiers": {}, "counters": dict.fromkeys(COUNTERS, 0)}
    assert list(changes(STATUS, away)) == list(changes(away, STATUS)) == []


def test_a_server_that_goes_and_comes_back() -> None:
    history = history_of()
    assert history.add(Reading(1002.0, None, None, "refused")) == ["the server is away: refused"]
    assert history.add(Reading(1005.0, None, None, "refused")) == []
    away = lines_of(history)
    assert away[0] == "tiny: ready, epoch 7   no answer for 5 s: trying again"
    assert away[1:20] == lines_of(history_of())[1:20]  # what was known stays
    assert line(history, []).endswith("  away for 5 s: refused")
    back = make_status("experts-9", stage="loading")
    assert history.add(Reading(1007.0, back, None, "no directory")) == [
        "the server is back after 7 s",
        "left: experts-0, experts-1, attention-0, ingress-0",
        "joined: experts-9",
        "loading",
    ]
    lines = lines_of(history)
    assert lines[0] == "tiny: loading, epoch 7"
    assert "not known: no directory" in lines
    assert lines[lines.index("events") + 1].endswith(" loading")  # the newest first


def test_a_line() -> None:
    text = line(history_of(), ["joined: experts-1"])
    assert text.split("  ")[1:] == [
        "tiny: ready",
        "epoch 7",
        "123 tokens/s",
        "3 running, 0 waiting",
        "TTFT 80 ms, 1.25 s",
        "ITL 8.1 ms, 12 ms",
        "experts 2/3",
        "attention 1/1",
        "hottest 0:0 8/s 50% on 0",
        "joined: experts-1",
    ]


def test_a_size_that_is_not_known_yet_is_left_out_and_no_event_when_it_is() -> None:
    tiers = {"experts": {"wanted": None, "present": 2}, "attention": {"wanted": 0, "present": 1}}
    unknown = STATUS | {"tiers": tiers}
    assert "replicas experts 2  attention 1/0" in lines_of(history_of(unknown))
    known = STATUS | {"tiers": {**tiers, "experts": {"wanted": 3, "present": 2}}}
    assert list(changes(unknown, known)) == list(changes(known, unknown)) == []


# ---- against a server


@pytest.fixture
def stub() -> Iterator[ShoalStub]:
    with ShoalStub({"/status": STATUS, "/v1/experts/load": load_body(LOAD)}) as server:
        yield server


def run(url: str, *args: str) -> Result:
    app = typer.Typer()
    app.command()(top)
    return CliRunner().invoke(app, [*args, "--url", url])


def test_read(stub: ShoalStub) -> None:
    client = ApiClient(stub.url)
    assert read(client, lambda: 5.0) == Reading(5.0, STATUS, LOAD)
    del stub.bodies["/v1/experts/load"]
    assert read(client, lambda: 5.0) == Reading(5.0, STATUS, None, "HTTP status 404")
    stub.bodies["/v1/experts/load"] = {"layers": []}
    assert "/v1/experts/load?compact=true answers without workers" in read(client).error
    stub.bodies["/status"] = {"status": "ok"}
    with pytest.raises(ApiError, match="/status answers without model, ready, stage"):
        read(client)
    away = read_or_away(ApiClient("http://127.0.0.1:9"), lambda: 5.0)
    assert away == replace(away, at_s=5.0, status=None, load=None)
    assert "no Shoal at http://127.0.0.1:9: Connection refused" in away.error


def test_once(stub: ShoalStub) -> None:
    result = run(stub.url, "--once")
    assert result.exit_code == 0
    assert "tiny: ready, epoch 7" in result.stdout and "0 ▅▅▅▄▄▄▃▃▃▃▃▃ 0.50" in result.stdout


def test_once_as_json(stub: ShoalStub) -> None:
    body = json.loads(run(stub.url, "--once", "--json").stdout)
    assert body["status"] == STATUS and body["load"]["recent_rows"] == LOAD.recent_rows


def test_no_server_is_exit_3() -> None:
    result = run("http://127.0.0.1:9")
    assert result.exit_code == 3
    assert result.stderr.startswith("shoal: no Shoal at http://127.0.0.1:9")
    assert result.stderr.count("\n") == 1


def test_a_key_is_given_or_asked_for() -> None:
    with ShoalStub({"/status": STATUS, "/v1/experts/load": load_body(LOAD)}, key="k1") as server:
        assert run(server.url, "--once", "--api-key", "k1").exit_code == 0
        refused = run(server.url, "--once")
    assert refused.exit_code == 3
    assert refused.stderr == "shoal: no key Set SHOAL_API_KEY or give --api-key.\n"


@pytest.mark.parametrize("options", [["--json"], []])
def test_without_a_terminal_a_line_each_interval_until_ctrl_c(
    stub: ShoalStub, options: list[str]
) -> None:
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = heard + "import typer; from cluster.top_cli import top; typer.run(top)"
    with subprocess.Popen(
        [sys.executable, "-c", code, "--interval", "0.2", *options, "--url", stub.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "tiny" in process.stdout.readline()
        stub.stop()
        while "Connection refused" not in (text := process.stdout.readline()):
            assert text
        stub.start()
        while "tiny" not in (text := process.stdout.readline()):
            assert text
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(TIMEOUT_S) == 130
        assert process.stderr.read() == ""
