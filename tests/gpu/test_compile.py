"""Every kernel compiles for the GPUs that it is for, within their limits, and never asks the host.

Needs no GPU: tools/compile_kernels.py runs in a process of its own, as kernels imported here would
be the interpreter's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compile_kernels.py"

TOO_LARGE = """
import torch
import triton
import triton.language as tl


@triton.jit
def product(x, out, K, M: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, BLOCK)
    acc = tl.zeros((M, M), tl.float32)
    for start in tl.range(0, K, BLOCK):
        tile = tl.load(x + rows[:, None] * K + start + columns[None, :])
        acc = tl.dot(tile, tile.T, acc)
    tl.store(out + rows[:, None] * M + rows[None, :], acc)


def call(rows, block, asks=False):
    x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
    out = torch.empty(rows, rows, device="meta")
    if asks:
        out.sum().item()
    product[(1,)](x, out, 4096, rows, block, num_stages=6)


def cases(native_fp8):
    yield "small", lambda: call(32, 128)
    yield "large", lambda: call(128, 256)
    yield "asks", lambda: call(32, 128, asks=True)
"""


def compile_kernels(folder: Path, *args: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, outcomes and what was printed."""
    report = folder / "report.json"
    command = ["nice", "-n", "5", sys.executable, str(TOOL), "--json", str(report), *args]
    environment = {**os.environ, "PYTHONPATH": f"{TOOL.parents[1]}:{folder}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert report.exists(), done.stderr
    return done.returncode, json.loads(report.read_text()), done.stdout


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel in the shapes of V3 for Hopper, the products for the other targets too, and what
    has tiles of its own for sm_89; the tool itself takes all shapes for all targets."""
    found = []
    for targets, only in (
        (["sm_90"], ["v3", "linear-576-7168-64"]),
        (["sm_80", "sm_100"], ["v2-4096-fp8", "mla_decode/v3/fp8/splits 4", "gate_logits v3"]),
        (["sm_89"], ["v2-4096-fp8", "mla_decode/v3/bf16/splits 4", "mla_prefill/v3"]),
    ):
        args = [arg for t in targets for arg in ("--target", t)]
        args += [arg for name in only for arg in ("--only", name)]
        code, outcomes, printed = compile_kernels(tmp_path_factory.mktemp("compiled"), *args)
        assert code == 0, printed
        found += [launch for outcome in outcomes for launch in outcome["launches"]]
    return found


@pytest.mark.slow
def test_every_kernel_is_within_the_limits_of_its_target(launches: list[dict[str, Any]]) -> None:
    """The tool's own verdict (exit code 0), and its figures once more."""
    shared = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448}
    for la in launches:
        assert la["shared_bytes"] <= shared[la["target"]], la
        assert la["registers"] <= 255 and la["stack_bytes"] <= 160, la
    packages = {la["case"].partition("/")[0] for la in launches}
    assert packages == {"experts", "router", "attention"}


@pytest.mark.slow
def test_products_use_the_matrix_instructions_of_their_target(
    launches: list[dict[str, Any]],
) -> None:
    """Hopper and Blackwell multiply fp8 by fp8; Ampere, which cannot, is never asked to."""
    instructions = {
        "sm_80": {"mma"},
        "sm_89": {"mma"},
        "sm_90": {"mma", "wgmma"},
        "sm_100": {"mma", "tcgen05"},
    }
    fp8 = dict.fromkeys(instructions, False)
    for la in launches:
        assert set(la["matrix_instructions"]) <= instructions[la["target"]], la
        fp8[la["target"]] |= "f8E4M3FN" in la["dots"]
    assert fp8 == {"sm_80": False, "sm_89": True, "sm_90": True, "sm_100": True}
    gate = {la["target"]: la for la in launches if la["kernel"] == "_logits_kernel"}
    assert gate["sm_90"]["matrix_instructions"] == ["wgmma"]
    assert gate["sm_100"]["matrix_instructions"] == ["tcgen05"]


@pytest.mark.slow
def test_what_breaks_a_limit_is_reported(tmp_path: Path) -> None:
    (tmp_path / "large_cases.py").write_text(TOO_LARGE)
    code, outcomes, printed = compile_kernels(
        tmp_path, "--cases", "large_cases", "--target", "sm_90"
    )
    assert code == 1
    assert "large_cases/large sm_90: product: shared memory 393216 > 232448 bytes" in printed
    assert "large_cases/asks sm_90: RuntimeError: Tensor.item() cannot be called" in printed
    small = outcomes[0]["launches"][0]
    assert not outcomes[0]["error"]
    assert small["constants"] == {"M": "32", "BLOCK": "128"}
    assert small["dots"] == ["bf16"] and small["matrix_instructions"]
