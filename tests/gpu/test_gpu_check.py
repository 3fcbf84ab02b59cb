"""benchmarks/gpu_check.py: what it finds, what it counts, and a run of it without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts: their folder is on the path while they run

from gpu_check import accounting, check_attention, check_experts, check_router, goals  # noqa: E402
from gpu_check.child import run_units  # noqa: E402
from gpu_check.compare import POISON_BYTE_INT, Poisoned, difference, poison  # noqa: E402
from gpu_check.kernel_checks import Case, alone, check, tensors_of  # noqa: E402
from gpu_check.plan import Context, Unit, lacking, run_unit  # noqa: E402
from gpu_check.report import markdown, problems  # noqa: E402
from gpu_check.rows import (  # noqa: E402
    Benchmark,
    Ceiling,
    Check,
    Note,
    new_results,
    rows_of,
    to_message,
    validate,
)
from gpu_check.sections import SECTIONS, SHARES, ends_of  # noqa: E402
from gpu_check.shapes import MODELS, V2_LITE, V3  # noqa: E402
from gpu_check.timing import CudaTimer, NoTimer  # noqa: E402
from gpu_check.variants import check_warm  # noqa: E402

from attention.kernels.gpu.ops import AttentionOps, attention_ops  # noqa: E402
from cluster.deploy.known_models import KNOWN  # noqa: E402
from experts.config import ModelConfig  # noqa: E402
from experts.device import ComputeDevice  # noqa: E402
from experts.kernels.gpu.ops import expert_ops  # noqa: E402
from router.kernels.gpu.ops import router_ops  # noqa: E402

SMOKE_S = 1200.0
"""Generous: the machine may be busy. Alone it takes half a minute."""
CEILINGS = {"copy": 4e12, "bfloat16": 800e12, "fp8": 1600e12}


@pytest.fixture
def context() -> Context:
    device = ComputeDevice(torch.device("cpu"), torch.float32, "torch", "test")
    return Context(device, NoTimer(), smoke=True)


def checks_of(units: Any, kernel: str) -> list[Check]:
    """The rows of this kernel's units, in this process."""
    rows = [row for unit in units if unit.name.startswith(kernel) for row in run_unit(unit)]
    assert rows
    assert all(isinstance(row, Check) for row in rows), rows
    return [row for row in rows if isinstance(row, Check)]


# --- what a check finds ---


def test_twins_agree_with_themselves(context: Context) -> None:
    found = checks_of(check_experts.units(context, expert_ops("torch")), "sum_pairs")
    assert all(row.passed for row in found)


@pytest.mark.parametrize(
    ("section", "open_ops"),
    [
        (check_experts, expert_ops),
        (check_router, router_ops),
        (check_attention, attention_ops),
    ],
)
def test_every_kernel_is_checked(context: Context, section: Any, open_ops: Any) -> None:
    """One value, or one row, that is off is found in every case of every kernel."""
    twins = open_ops("torch")
    for field in dataclasses.fields(twins):
        kernels = dataclasses.replace(twins, **{field.name: off_by(getattr(twins, field.name))})
        found = checks_of(section.units(context, kernels), f"{field.name}, ")
        missed = [row.shape for row in found if row.passed and "alone" not in row.shape]
        assert not missed, field.name


def off_by(function: Any) -> Any:
    """The same function with another first row: of its result, or of the argument it changes."""

    def wrong(*args: Any, **settings: Any) -> Any:
        result = function(*args, **settings)
        first = next(tensors_of(result), args[0])
        if first.dtype == torch.float8_e4m3fn:
            first.view(torch.uint8)[0] ^= 1
        else:
            first[0] += 0.5 if first.dtype.is_floating_point else 1
        return result

    return wrong


def test_a_wrong_kernel_is_found(context: Context) -> None:
    twins = expert_ops("torch")

    def wrong_at_the_end(*args: Any) -> Tensor:
        out = twins.sum_pairs(*args)
        out[-1, -1] += 1.0
        return out

    kernels = dataclasses.replace(twins, sum_pairs=wrong_at_the_end)
    found = checks_of(check_experts.units(context, kernels), "sum_pairs")
    assert found
    assert not any(row.passed for row in found)
    assert all(row.error is not None and row.error > 0.01 for row in found)


def test_what_a_kernel_leaves_unwritten_is_found(context: Context) -> None:
    twins = expert_ops("torch")

    def forgets_a_row(pair_rows: Tensor, row_starts: Tensor) -> Tensor:
        out = torch.empty(len(row_starts) - 1, pair_rows.shape[1])
        out[:-1] = twins.sum_pairs(pair_rows, row_starts)[:-1]
        return out

    kernels = dataclasses.replace(twins, sum_pairs=forgets_a_row)
    found = checks_of(check_experts.units(context, kernels), "sum_pairs")
    assert all("64 of" in row.problem and "poison" in row.problem for row in found)  # a row: d 64


def test_a_kernel_that_raises_is_a_problem_of_its_own_check(context: Context) -> None:
    def raises(*_: Any) -> Tensor:
        raise RuntimeError("no such instruction")

    kernels = dataclasses.replace(router_ops("torch"), pack_rows=raises)
    units = list(check_router.units(context, kernels))
    assert all("no such instruction" in row.problem for row in checks_of(units, "pack_rows, "))
    assert all(row.passed for row in checks_of(units, "combine_rows"))


def test_a_wrong_choice_of_experts_is_found(context: Context) -> None:
    twins = router_ops("torch")

    def highest_index_wins(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
        ids, weights, bad_row = twins.select_experts(logits.flip(1), *args)
        return (logits.shape[1] - 1 - ids).flip(1), weights.flip(1), bad_row

    kernels = dataclasses.replace(twins, select_experts=highest_index_wins)
    found = checks_of(check_router.units(context, kernels), "select_experts")
    ties = [row for row in found if "ties" in row.shape]
    assert ties
    assert not any(row.passed for row in ties)


def test_two_runs_that_differ_are_found() -> None:
    runs = iter([torch.ones(3), torch.ones(3), torch.ones(3) + 1e-7])
    case = Case("sum", "3", "float32", lambda _: next(runs), 1e-5)
    assert check(case, kernels="kernels", twins="twins").problem == "two runs differ"


def test_a_row_that_depends_on_its_neighbours_is_found() -> None:
    x = torch.randn(4, 8)
    case = alone("norm", "4 rows", "float32", lambda _, count=4: x[:count] / x[:count].norm(), "t")
    row = check(case, kernels="kernels", twins="t")
    assert "8 of 8" not in row.problem  # a count: 8 values of the first row differ
    assert "first at 0: 8, the twin has 0" in row.problem


def test_poison_fills_what_torch_does_not() -> None:
    with Poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty(2, 2, dtype=torch.bfloat16).isnan().all()
        assert torch.empty(3, dtype=torch.float8_e4m3fn).float().isnan().all()
        assert torch.zeros(2).new_empty(2).isnan().all()
        assert torch.empty_like(torch.zeros(2)).isnan().all()
        assert not torch.zeros(3).isnan().any()
        number = int(torch.empty(1, dtype=torch.int32))
        fp8_cache = torch.empty(8, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        assert fp8_cache.view(dtype).float().isnan().all()
    assert number == int.from_bytes(bytes([POISON_BYTE_INT] * 4), "little")
    assert not torch.ones(2).isnan().any()


def test_difference_is_that_of_the_worst_row() -> None:
    expected = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    found = torch.tensor([[3.0, 4.5], [300.0, 400.5]])
    assert difference(found, expected).error == pytest.approx(0.1)  # 0.5 of a row of length 5
    assert difference(torch.zeros(2, 2), torch.zeros(2, 2)).error == 0
    assert difference(torch.full((2, 2), 1e-9), torch.zeros(2, 2)).error == 1  # zeros are exact
    assert "float64" in difference(expected.double(), expected).problem
    poisoned = poison(torch.zeros(4, dtype=torch.int32))
    assert "never written" in difference(poisoned, torch.zeros(4, dtype=torch.int32)).problem


# --- what is counted ---


def test_bytes_and_flops_of_mla_decode() -> None:
    """V3, 64 sequences of 4096: 128 heads over 576 values for scores and 512 for sums."""
    work = accounting.mla_decode(V3, 64, 4096)
    assert work.flops == 2 * 64 * 128 * 4096 * (576 + 512) == 73_014_444_032
    cache, queries, out = 64 * 4096 * 1152, 64 * 128 * 1152, 64 * 128 * 1024
    assert work.num_bytes == cache + queries + out == 319_815_680
    fp8 = accounting.mla_decode(V3, 64, 4096, fp8=True)
    assert fp8.num_bytes == 64 * 4096 * 656 + queries + out
    assert fp8.flops == work.flops


def test_bytes_and_flops_of_the_grouped_products() -> None:
    """V3: 4096 pairs over 32 experts of 3 x 2048 x 7168."""
    up, down = accounting.gate_up(V3, 4096, 4096, 32), accounting.down(V3, 4096, 32)
    assert up.flops + down.flops == 6 * 4096 * 2048 * 7168 == 360_777_252_864
    weights = 32 * 3 * 2048 * 7168 * 2
    assert weights == 2_818_572_288
    rows = 4096 * 7168 * 2 + 4096 * 2048 * 2 + 4096 * 2048 * 2 + 4096 * 7168 * 4
    assert up.num_bytes + down.num_bytes == weights + rows
    fp8 = accounting.gate_up(V3, 64, 64, 20, fp8=True)
    of_an_expert = 2 * (2048 * 7168 + 16 * 56 * 4)
    assert fp8.num_bytes == 20 * of_an_expert + 64 * (7168 + 56 * 4) + 64 * 2048 * 2


def test_bytes_of_a_decode_step() -> None:
    """V2-Lite: 15.7 B parameters less the embedding, in bfloat16, and 31,104 bytes a token."""
    step = accounting.decode_step(V2_LITE, 64, 1024, 64)
    embedding = 102_400 * 2048
    assert step.num_bytes == pytest.approx(
        2 * (15.71e9 - embedding) + 64 * 1024 * 31_104, rel=0.002
    )
    one = accounting.decode_step(V2_LITE, 1, 1024, 6)
    assert one.num_bytes == pytest.approx(2 * 2.45e9 + 1024 * 31_104, rel=0.005)
    assert accounting.experts_touched(V2_LITE, 1) == pytest.approx(6)


def test_shapes_are_those_of_the_known_models() -> None:
    for shape, name in zip(MODELS, ("v2-lite", "v2", "v3"), strict=True):
        config = ModelConfig.parse(KNOWN[name])
        for field in dataclasses.fields(shape):
            if field.name not in ("name", "routed_scaling_factor"):  # known_models has no scale
                assert getattr(config, field.name) == getattr(shape, field.name), field.name


def test_the_ceiling_that_binds() -> None:
    work = Benchmark("k", "s", "bfloat16", num_bytes=4_000_000, flops=400_000_000, seconds=2e-6)
    assert goals.binding(work, CEILINGS) == ("copy", pytest.approx(1e-6))
    assert goals.value_of(work, "bound", CEILINGS) == pytest.approx(0.5)
    assert goals.value_of(work, "copy", CEILINGS) == pytest.approx(0.5)
    assert goals.value_of(work, "rate", CEILINGS) == pytest.approx(0.25)
    assert goals.best_value(work, "rate", CEILINGS) == pytest.approx(0.5)
    heavier = dataclasses.replace(work, flops=1_600_000_000)
    assert goals.binding(heavier, CEILINGS) == ("bfloat16", pytest.approx(2e-6))
    assert goals.binding(heavier, {"copy": 4e12}) is None
    assert goals.value_of(heavier, "bound", {}) is None


def test_goals_are_met_missed_or_not_measured() -> None:
    def verdict(goal: str, seconds: float | None) -> str:
        one = Benchmark("k", "s", "bfloat16", 4_000_000, 0, seconds, goal=goal)
        texts = [v.text for v in goals.verdicts([one], CEILINGS) if v.goal is goals.GOALS[goal]]
        return " ".join(texts)

    assert verdict("mla-decode", 1e-6 / 0.69) == "missed"
    assert verdict("mla-decode", 1e-6 / 0.71) == "met"
    assert verdict("mla-decode", None) == "not measured"
    assert verdict("routing", 59e-6) == "met"
    assert verdict("routing", 61e-6) == "missed"
    assert [v.text for v in goals.verdicts([], {})] == ["not measured"] * len(goals.GOALS)


# --- the report ---


def results_of(*rows: Any) -> dict[str, Any]:
    results = new_results(smoke=False)
    names = ("name", "slug", "driver", "torch", "triton", "cuda", "commit", "date")
    results["device"] = dict.fromkeys(names, "x")
    for row in rows:
        for kind, fields in to_message(row).items():
            results[kind].append(fields)
    return results


def test_a_failure_names_kernel_shape_and_error() -> None:
    wrong = Check("down", "V3, 64 rows", "fp8", 0.5, 0.01)
    results = results_of(
        wrong, Check("down", "odd", "fp8", 0.0, 0.01), Note("hop", "no answer", True),
        Note("ray", "skipped: no module ray", False),
    )  # fmt: skip
    validate(results)
    assert rows_of(results, "checks")[0] == wrong
    assert problems(results) == [
        "down, V3, 64 rows, fp8: error 5.00e-01, allowed 1.00e-02",
        "hop: no answer",
    ]
    text = markdown(results)
    assert "1 of 2 results agree" in text
    assert "| ray | skipped: no module ray |" in text


def test_an_error_that_is_no_number_fails() -> None:
    results = results_of(Check("down", "s", "fp8", float("nan"), 0.01))
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert not rows_of(results, "checks")[0].passed
    assert problems(results) == ["down, s, fp8: error not known, allowed 1.00e-02"]


def test_shares_and_rates_of_the_report() -> None:
    results = results_of(
        Ceiling("copy", "GB/s", 4e12, "how"),
        Benchmark("k", "s", "float32", 4_000_000, 0, 2e-6, {"torch": 4e-6, "other": None}, 10),
    )
    assert "| k | s | float32 | 2.0 us | 2000 | - | copy | 50% | 5e+06 | " in markdown(results)
    assert "torch 4.0 us (2.00x), other not measured" in markdown(results)


def test_results_of_another_form_are_refused() -> None:
    results = results_of(Ceiling("copy", "GB/s", None, "how"))
    validate(results)
    results["ceilings"][0]["value"] = "4 TB/s"
    with pytest.raises(ValueError, match=r"ceilings\[0\]\.value"):
        validate(results)


# --- captures and compiles ---


def test_a_failed_capture_is_timed_by_launches_and_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextlib.contextmanager
    def breaks(_: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("capture_end: the capture is invalid")

    def work() -> None:
        if capturing:
            raise RuntimeError("it waits for the device")

    capturing = False

    def graph(_: Any) -> Any:
        nonlocal capturing
        capturing = True
        return breaks(_)

    def synchronize() -> None:
        nonlocal capturing
        capturing = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(CudaTimer, "_median", lambda self, run: run() or 1.0)
    timer = object.__new__(CudaTimer)
    timer.capture_failure = ""
    assert timer.time(work) == (1.0, "eager")
    assert timer.capture_failure == "RuntimeError: it waits for the device"


def jit_function(name: str, variants: int) -> Any:
    from triton.runtime.jit import JITFunction

    kernel = object.__new__(JITFunction)
    kernel.fn = SimpleNamespace(__module__="experts.made_up", __name__=name)
    kernel.device_caches = defaultdict(lambda: ({}, {}, None, None, None))
    use(kernel, variants)
    return kernel


def use(kernel: Any, variants: int) -> None:
    kernel.device_caches[0][0].update((key, object()) for key in range(variants))


def test_what_is_compiled_after_warm_up_is_found(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("experts.made_up")
    module.down, module.up = jit_function("down", 5), jit_function("up", 0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "experts.made_up", module)

    def serve() -> None:
        use(module.down, 3)
        use(module.up, 1)

    row = check_warm(context, "batches", lambda: use(module.down, 2), serve)
    assert not row.passed  # the five from before were forgotten, two of the three known
    assert row.error == 2
    assert row.problem == "1 of experts.made_up.down, 1 of experts.made_up.up"
    row = check_warm(context, "batches", serve, serve)
    assert row.passed
    on_device = dataclasses.replace(context, smoke=False)
    row = check_warm(on_device, "batches", lambda: None, lambda: None)
    assert row.problem == "no kernel was counted"


# --- sections and processes ---


def test_a_missing_module_of_others_is_no_fault() -> None:
    def imports(name: str) -> Any:
        error = ModuleNotFoundError(f"No module named {name!r}", name=name)
        return Unit("unit", lambda: (_ for _ in ()).throw(error))

    assert list(run_unit(imports("ray"))) == [Note("unit", "skipped: no module ray", False)]
    (ours,) = run_unit(imports("experts.nothing"))
    assert isinstance(ours, Note)
    assert ours.failed
    assert lacking("u", ImportError("cannot import name")).failed


def test_each_section_has_its_share_of_the_time() -> None:
    """So that cold compiles of the checks leave the times, the engine and Ray theirs."""
    assert list(SHARES) == list(SECTIONS)
    ends = dict(zip(SECTIONS, ends_of(list(SECTIONS), 1000.0, 1480.0), strict=True))
    assert ends["ray"] == pytest.approx(1480.0)
    assert 0.4 < (ends["attention"] - 1000.0) / 480.0 < 0.6
    assert ends_of(["router-times", "expert-times"], 0.0, 48.0) == pytest.approx([16.0, 48.0])


def test_what_its_section_has_no_time_for_is_left_to_the_next(context: Context) -> None:
    ran: list[str] = []

    def unit(name: str, section: int) -> Unit:
        return Unit(name, lambda: filter(None, [ran.append(name)]), section)

    units = [unit("a", 0), unit("b", 0), unit("c", 0), unit("d", 1), unit("e", 2)]
    now_s, told = time.monotonic(), []
    ends_s = [now_s - 1.0, now_s + 300.0, now_s - 1.0]
    sections = ["experts", "decode", "ray"]
    run_units(context, units, {"sections": sections, "ends_s": ends_s, "first": 1}, told.append)
    assert ran == ["d"]
    notes = [message["notes"] for message in told if "notes" in message]
    assert [(note["unit"], note["text"], note["failed"]) for note in notes] == [
        ("experts", "not run: out of time with 2 units left", True),
        ("ray", "not run: out of time with 1 units left", True),
    ]


FAKE_CHILD = """
import argparse, json, os
parser = argparse.ArgumentParser()
parser.add_argument("--spec"), parser.add_argument("--report", type=int)
options = parser.parse_args()
first = json.load(open(options.spec))["first"]
report = os.fdopen(options.report, "w", buffering=1)
for message in ({"device": {"name": "fake"}}, {"num_units": 4}):
    print(json.dumps(message), file=report)
for number in range(first, 4):
    print(json.dumps({"begin": number, "name": f"unit {number}"}), file=report)
    if number in (1, 3):
        print("illegal memory access", flush=True)
        os._exit(3)
    note = {"unit": f"unit {number}", "text": f"ran from {first}", "failed": False}
    print(json.dumps({"notes": note}), file=report)
    if number == 2:
        print(json.dumps({"next": 3}), file=report)
        os._exit(0)
"""
SUPERVISE = """
import json, pathlib, sys, time
from gpu_check import supervise
from gpu_check.rows import new_results
supervise.CHILD = pathlib.Path(sys.argv[1])
results = new_results(False)
supervise.Supervisor(results, [], time.monotonic() + 600).run()
print(json.dumps(results))
"""


def test_a_kernel_that_takes_its_process_down_loses_its_unit_only(tmp_path: Path) -> None:
    """In a process of its own: the supervisor ends every process below it."""
    child = tmp_path / "child.py"
    child.write_text(FAKE_CHILD)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
    command = [sys.executable, "-c", SUPERVISE, str(child)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    results = json.loads(found.stdout)
    notes = rows_of(results, "notes")
    assert [(note.unit, note.failed) for note in notes] == [
        ("unit 0", False),
        ("unit 1", True),
        ("unit 2", False),
        ("unit 3", True),
    ]
    assert notes[2].text == "ran from 2"
    assert "exit code 3" in notes[1].text
    assert "illegal memory access" in notes[1].text
    assert results["finished"]


def run_script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=SMOKE_S
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    found = run_script(cwd=tmp_path)
    assert found.returncode == 2
    assert "--smoke" in found.stderr
    assert not list((ROOT / "benchmarks" / "results").glob("gpu-smoke*"))


@pytest.mark.slow
def test_smoke_runs_every_section(tmp_path: Path) -> None:
    found = run_script("--smoke", "--out", str(tmp_path), "--limit", str(SMOKE_S), cwd=tmp_path)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    results = json.loads((tmp_path / "gpu-smoke.json").read_text())
    validate(results)
    assert results["finished"]
    assert not problems(results)
    assert {check.passed for check in rows_of(results, "checks")} == {True}
    kernels = {check.kernel for check in rows_of(results, "checks")}
    for ops in (expert_ops("torch"), router_ops("torch")):
        assert {field.name for field in dataclasses.fields(ops)} <= kernels
    assert {field.name for field in dataclasses.fields(AttentionOps)} <= kernels
    assert all(row.value is None for row in rows_of(results, "ceilings"))
    assert all(row.seconds is None for row in rows_of(results, "benchmarks"))
    assert [note.unit for note in rows_of(results, "notes")] == ["application on Ray"]
    assert len(rows_of(results, "benchmarks")) >= len(SECTIONS)
    text = (tmp_path / "gpu-smoke.md").read_text()
    assert "not measured" in text
    assert "met |" not in text
