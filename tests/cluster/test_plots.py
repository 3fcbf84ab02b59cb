"""`shoal plot`: its data from what a server says, its pictures, its refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from cluster.plot_cli import plot_app
from cluster.plot_data import experts_data, latency_data, scaling_data, scaling_sample
from tests.shoal_stub import ShoalStub, load_body, make_load, make_status, make_worker

TTFT = "vllm_time_to_first_token_seconds"
LOAD = load_body(make_load([[40, 20, 10, 10], [0, 5, 0, 5]], first_layer=3))
STATUS = make_status(
    make_worker("experts-0", busy=0.5),
    make_worker("experts-1", busy=0.25),
    make_worker("attention-0"),
    tiers={"experts": {"wanted": 3, "present": 2}},
    rates={"generated_tokens_per_s": 12.5},
)


def metrics(up_to: dict[str, list[int]], names: tuple[str, ...] = (TTFT,)) -> str:
    """Text of histograms with the bounds 0.1 and 1; up_to: worker_id -> values up to each."""
    lines = []
    for name in names:
        lines.append(f"# TYPE {name} histogram")
        for worker_id, counts in up_to.items():
            for bound, count in zip(("0.1", "1.0", "+Inf"), counts, strict=True):
                lines.append(f'{name}_bucket{{worker_id="{worker_id}",le="{bound}"}} {count}')
            lines += [f'{name}_sum{{worker_id="{worker_id}"}} 3.5']
            lines += [f'{name}_count{{worker_id="{worker_id}"}} {counts[-1]}']
    return "\n".join([*lines, "# TYPE other gauge", "other 1", ""])


# ---- data


def test_latencies_are_what_came_between_two_readings_from_all_workers() -> None:
    before, after = {"a": [1, 2, 3]}, {"a": [2, 5, 6], "b": [1, 1, 3]}
    data = latency_data(metrics(before), metrics(after), 30.0)
    assert data["seconds"] == 30.0
    assert data["histograms"]["ttft_s"] == {"bounds": [0.1, 1.0], "counts": [2, 2, 2]}
    assert data["histograms"]["itl_s"] == {"bounds": [], "counts": []}


def test_latencies_of_a_server_that_started_anew_are_all_it_has() -> None:
    data = latency_data(metrics({"a": [9, 9, 9]}), metrics({"b": [1, 2, 3]}), 30.0)
    assert data["histograms"]["ttft_s"]["counts"] == [1, 1, 1]


def test_a_sample_of_scaling() -> None:
    assert scaling_sample(1.0004, STATUS) == {
        "at_s": 1.0,
        "tiers": {"experts": {"wanted": 3, "present": 2}},
        "busy": {"experts": 0.375},
        "generated_tokens_per_s": 12.5,
    }
    nothing = {"at_s": 2.0, "tiers": {}, "busy": {}, "generated_tokens_per_s": None}
    assert scaling_sample(2.0, None) == nothing == scaling_sample(2.0, make_status("experts-0"))


# ---- figures


def test_the_heat_map_holds_rows_a_second() -> None:
    from cluster.plots import experts

    heat, balance, _ = experts(experts_data(LOAD)).axes
    (image,) = heat.images
    assert image.get_array().tolist() == [[8, 4, 2, 2], [0, 1, 0, 1]]
    assert [text.get_text() for text in heat.get_yticklabels()] == ["3", "4"]
    assert [bar.get_width() for bar in balance.patches] == [0.5, 0.5]


def test_the_latencies_hold_shares_and_quantiles() -> None:
    """Of 4 values 1 is up to 0.1 s and 4 are up to 1 s, so half are up to 0.1 + 0.9 x 1/3 s."""
    from cluster.plots import latency

    text = metrics({"a": [1, 4, 4]})
    first_token, between, whole = latency(latency_data("", text, 0)).axes
    shares, *quantiles = first_token.lines
    assert shares.get_xydata().tolist() == [[50, 0], [100, 25], [1000, 100]]
    assert [line.get_label() for line in quantiles] == [
        "p50 400 ms",
        "p90 880 ms",
        "p99 988 ms",
    ]
    assert [axes.texts[0].get_text() for axes in (between, whole)] == ["none", "none"]


def test_the_time_line_has_a_gap_where_the_server_was_away() -> None:
    from cluster.plots import scaling

    samples = [scaling_sample(0, STATUS), scaling_sample(1, None), scaling_sample(2, STATUS)]
    replicas, busy, tokens = scaling(scaling_data("tiny", samples)).axes
    lines = {line.get_label(): line.get_ydata() for axes in (replicas, busy) for line in axes.lines}
    expected = {"experts present": 2, "experts wanted": 3, "experts": 0.375}
    for name, value in expected.items():
        np.testing.assert_array_equal(lines[name], [value, math.nan, value])
    np.testing.assert_array_equal(tokens.lines[0].get_ydata(), [12.5, math.nan, 12.5])


# ---- commands


@pytest.fixture
def stub() -> Iterator[ShoalStub]:
    text = metrics({"a": [1, 4, 4]})
    with ShoalStub({"/v1/experts/load": LOAD, "/status": STATUS, "/metrics": text}) as server:
        yield server


class Clock:
    """The command's: sleeping takes exactly as long as asked for."""

    def __init__(self) -> None:
        self._now_s = 100.0

    def monotonic(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        self._now_s += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.plot_cli.time", Clock())


def plot(*args: str | Path) -> Result:
    return CliRunner().invoke(plot_app, [str(arg) for arg in args])


SHORT: dict[str, list[str]] = {
    "experts": [],
    "latency": ["--seconds", "0"],
    "scaling": ["--seconds", "1", "--interval", "0.5"],
}
PIXELS = {"experts": (1200, 300), "latency": (1440, 480), "scaling": (1200, 960)}


@pytest.mark.parametrize("kind", SHORT)
def test_a_picture_now_and_again_from_its_data(kind: str, stub: ShoalStub, tmp_path: Path) -> None:
    now, again, data = (tmp_path / name for name in ("now.png", "again.png", "data.json"))
    result = plot(kind, *SHORT[kind], "-o", now, "--json", "--url", stub.url)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (0, f"{now} is written")
    data.write_text(result.stdout)
    assert plot(kind, "--from", data, "-o", again).exit_code == 0
    with Image.open(now) as first, Image.open(again) as second:
        assert first.size == PIXELS[kind]
        assert first.tobytes() == second.tobytes()
        assert len(first.getcolors(first.width * first.height)) > 20


def test_a_picture_for_the_web(stub: ShoalStub, tmp_path: Path) -> None:
    path = tmp_path / "heat.svg"
    assert plot("experts", "-o", path, "--url", stub.url).exit_code == 0
    assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314


def test_scaling_samples_at_each_interval(stub: ShoalStub) -> None:
    result = plot("scaling", *SHORT["scaling"], "--json", "--url", stub.url)
    samples = json.loads(result.stdout)["samples"]
    assert [sample["at_s"] for sample in samples] == [0.0, 0.5, 1.0]
    assert all(sample["generated_tokens_per_s"] == 12.5 for sample in samples)


def broken(folder: Path, data: Any) -> Path:
    path = folder / "saved.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_refusals_are_one_line_and_exit_2(stub: ShoalStub, tmp_path: Path) -> None:
    here = tmp_path / "a.png"
    stub.bodies["/metrics"] = metrics({})
    refused = {
        "give -o FILE.png for a picture, or --json for the data": ["experts"],
        "a.jpg: expected one of .png, .svg, .pdf": ["experts", "-o", tmp_path / "a.jpg"],
        "no such folder": ["experts", "-o", tmp_path / "none" / "a.png"],
        "no-file.json: [Errno 2]": ["experts", "-o", here, "--from", tmp_path / "no-file.json"],
        "no tokens were generated": ["latency", "-o", here, "--seconds", "0", "--url", stub.url],
    }
    for text, args in refused.items():
        result = plot(*args)
        assert result.exit_code == 2 and text in result.stderr
        assert result.stderr.splitlines()[-1].startswith("shoal: ")
    for data in ("{", [], {"plot": "latency"}):
        result = plot("experts", "-o", here, "--from", broken(tmp_path, data))
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert not here.exists()


def test_without_matplotlib_the_pip_command_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("cluster.plots", "matplotlib.figure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = plot("experts", "-o", tmp_path / "a.png")
    assert result.exit_code == 2
    assert result.stderr == (
        "shoal: matplotlib is not installed: pip install 'shoal-serve[plot]'\n"
    )


def test_no_server_is_exit_3(tmp_path: Path) -> None:
    result = plot("scaling", "-o", tmp_path / "a.png", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 3 and "no Shoal at http://127.0.0.1:9" in result.stderr
