"""Kernels compiled ahead: when, for whom, and that it is all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import machine_code
from cluster.config import StartFailed

ROOT = Path(__file__).parents[2]
ONE_REQUEST = """
import sys
from cluster import machine_code
from cluster.config import parse_config
from cluster.inline import InlineCluster
from experts.kernels.finite import all_finite
from router.kernels.place import plan
from router.kernels.select import select_experts
from tests.cluster.test_same_tokens import inline_tokens

def signatures():
    return [loop.signatures for loop in (all_finite, plan, select_experts)]

assert machine_code.compile_all()
ahead = signatures()
with InlineCluster(parse_config({"model": sys.argv[1]})) as cluster:
    inline_tokens(cluster, [0, 20, 30], {"temperature": 0.0})
assert signatures() == ahead, (ahead, signatures())
"""


def test_a_fresh_cache_lacks_the_code_until_it_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert machine_code.is_missing()
    (tmp_path / machine_code._mark()).touch()
    assert not machine_code.is_missing()


def test_a_changed_kernel_is_missing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tmp_path / "kernel.py"
    kernel.touch()
    monkeypatch.setattr("router.kernels.__path__", [str(tmp_path)])
    before = machine_code._mark()
    assert machine_code._mark() == before
    os.utime(kernel, (1, 1))
    assert machine_code._mark() != before


def test_nothing_is_compiled_where_torch_computes_or_no_cache_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SHOAL_KERNELS", "torch")
    assert not machine_code.is_missing()
    monkeypatch.delenv("SHOAL_KERNELS")
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert not machine_code.is_missing()


def test_a_mark_replaces_older_ones_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "complete-0123456789abcdef").touch()
    (tmp_path / "kernel.nbi").touch()
    machine_code._write_mark(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {machine_code._mark(), "kernel.nbi"}


@pytest.fixture
def start_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], machine_code.Compilation]:
    """`start_script("exit 1")`: a compilation that runs these lines in place of Python."""

    def start(lines: str) -> machine_code.Compilation:
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\n{lines}\n")
        script.chmod(0o755)
        monkeypatch.setattr(machine_code, "is_missing", lambda: True)
        monkeypatch.setattr(sys, "executable", str(script))
        compilation = machine_code.Compilation()
        compilation.start()
        return compilation

    return start


StartScript = Callable[[str], machine_code.Compilation]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("printf 'Traceback:\\nOSError: disk full\\n\\n' >&2; exit 1", "OSError: disk full"),
        ("exit 3", "exit code 3"),
        ("yes 'more than a pipe holds' | head -n 20000 >&2; echo end >&2; exit 1", "end"),
    ],
    ids=["stderr", "silent", "long"],
)
def test_a_compilation_that_fails_stops_no_start_and_says_why(
    lines: str, reason: str, start_script: StartScript, caplog: pytest.LogCaptureFixture
) -> None:
    compilation = start_script(lines)
    compilation.wait()
    assert not compilation.is_running
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"kernels are not compiled ahead: {reason}")
    ]


def test_a_folder_of_the_user_does_not_hide_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shoal's own compilation is what runs there, and finds nothing to compile."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").write_text("raise SystemExit('not yours')")
    monkeypatch.setattr(machine_code, "is_missing", lambda: True)
    monkeypatch.setenv("SHOAL_KERNELS", "torch")
    monkeypatch.chdir(tmp_path)
    compilation = machine_code.Compilation()
    compilation.start()
    compilation.wait()
    assert caplog.messages == [f"kernels are not compiled ahead: {machine_code.NOTHING_KEPT}"]


def test_a_compilation_can_be_stopped(start_script: StartScript) -> None:
    compilation = start_script("exec sleep 600")
    assert compilation.is_running
    compilation.stop()
    assert not compilation.is_running
    with pytest.raises(StartFailed):
        compilation.wait()


def test_a_model_needs_no_kernel_that_was_not_compiled_ahead(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    """Small loops are compiled for the types of their first call: those must be everybody's."""
    command = [sys.executable, "-c", ONE_REQUEST, str(checkpoint_dir("v3"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
