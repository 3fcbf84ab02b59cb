"""Choosing kernels, keeping their machine code, and the threads that run them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from experts.kernels import code_folder, runtime
from experts.linear import linear
from tests.experts.weight_builders import num_threads, random_weight


def test_plain_torch_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_KERNELS", "torch")
    assert runtime._load() == runtime.Kernels("plain torch: SHOAL_KERNELS=torch")


def test_plain_torch_computes_when_the_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "experts.kernels.drivers", None)
    monkeypatch.delattr("experts.kernels.drivers", raising=False)
    chosen = runtime._load()
    assert not chosen.compiled
    assert chosen.reason.startswith("plain torch: ")


def test_reason_names_threads_and_folder() -> None:
    with num_threads(2):
        assert runtime.warm_up() == runtime.kernels().reason
    assert "compiled" in runtime.kernels().reason


def test_folder_of_machine_code_changes_with_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    source = tmp_path / "kernel.py"
    folders = []
    for text in ("a = 1", "a = 2", "a = 1"):
        source.write_text(text)
        with code_folder.machine_code_folder(tmp_path) as folder:
            folders.append(folder)
    assert folders[0] == folders[2] != folders[1]
    assert folders[0].parent == tmp_path / "cache" / "shoal" / "kernels"


def test_folder_that_the_user_has_set_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    with code_folder.machine_code_folder(tmp_path) as folder:
        assert folder == tmp_path


def test_private_folder_serves_when_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = code_folder._writable_cache()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "compiled anew" in caplog.text


def test_threads_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        runtime.configure_threads(0)


def test_threads_are_those_of_torch_and_of_the_helpers() -> None:
    runtime.warm_up()
    with num_threads(3):
        assert torch.get_num_threads() == 3
        assert _helpers() == 2
    with num_threads(1):
        assert _helpers() == 0


def _helpers() -> int:
    return sum(thread.name.startswith("kernel-helper") for thread in threading.enumerate())


def test_forked_child_computes_alone() -> None:
    w, x = random_weight("bfloat16", 600, 700), torch.randn(4, 700)
    with num_threads(2):
        expected = linear(x, w)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(linear(x, w), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(linear(x, w), expected)


def test_interpreter_ends_while_helpers_look_for_work() -> None:
    program = (
        "import torch; from experts.kernels import runtime; from experts.linear import *\n"
        "runtime.configure_threads(3)\n"
        "for _ in range(20): linear(torch.ones(1, 512), Weight(torch.ones(512, 512)))\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, timeout=600)
