"""The `shoal` command as a user runs it, in processes of its own.

`shoal serve` of a cluster, its printed curl and its end at both signals: tests/chaos/deployment.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.config import ConfigError
from cluster.deploy.known_models import KNOWN
from cluster.model_store import split_model_and_prompt
from cluster.tiny_presets import PRESETS

SHOAL = [sys.executable, "-m", "cluster"]


def shoal(*args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SHOAL, *args], capture_output=True, text=True, timeout=timeout_s)


def cpu_s() -> float:
    """What ended child processes computed; unlike the clock it is the same on a busy machine."""
    times = os.times()
    return times.children_user + times.children_system


def test_help_is_quick_and_names_the_commands() -> None:
    """It imports none of what takes long."""
    command = [sys.executable, "-X", "importtime", *SHOAL[1:], "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "serve" in result.stdout and "doctor" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "cluster.cli" in imported and not imported & {"numba", "ray", "torch", "transformers"}


def test_version_is_that_of_the_package() -> None:
    result = shoal("--version")
    assert (result.returncode, result.stdout) == (0, f"shoal {version('shoal-serve')}\n")


def test_make_tiny_names_its_presets_and_models_as_the_planner_does() -> None:
    shown = "".join(re.findall(r"[\w-]+", shoal("model", "make-tiny", "--help").stdout))
    assert set(KNOWN) < set(PRESETS)
    assert all(name in shown for name in PRESETS)


def test_make_tiny_then_verify_then_run_inline(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    assert shoal("model", "make-tiny", str(folder), "--preset", "v2-lite").returncode == 0
    verified = shoal("model", "verify", str(folder))
    assert verified.returncode == 0 and "ok, deepseek_v2" in verified.stdout
    arguments = ("run", "--inline", "--temperature", "0", "--max-tokens", "8", str(folder), "Hi")
    first, second = shoal(*arguments), shoal(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout != "\n"


def test_a_prompt_may_be_longer_than_any_path(tmp_path: Path) -> None:
    prompt = "tell me more " * 1000
    assert split_model_and_prompt([prompt]) == (None, prompt)
    assert split_model_and_prompt([str(tmp_path), prompt]) == (tmp_path, prompt)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("model", "make-tiny", "x", "--preset", "v9"), "preset"),
        (("serve", "/no/such/folder"), "/no/such/folder"),
        (("serve", "--http-port", "70000"), "http_port"),
        (("serve", "--router-mode", "sideways"), "router.mode"),
        (("serve", "--device", "gpu"), "device = 'gpu'"),
        (("serve", "--experts", "2-"), "--experts 2-6"),
        (("serve", "--experts", "4-2"), "max_workers = 2 is less than min_workers = 4"),
        (("serve", "--inline", "--experts", "2-4"), "--inline"),
        (("serve", "--inline", "--enable-chaos"), "--inline"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(args: tuple[str, ...], text: str) -> None:
    result = shoal(*args)
    assert result.returncode == 2
    assert text in result.stderr and "Traceback" not in result.stderr


def test_a_truncated_checkpoint_never_starts(
    tmp_path: Path, checkpoint_dir: Callable[[str], Path]
) -> None:
    for file in checkpoint_dir("v3").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model-00002-of-000003.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    began_s = cpu_s()
    result = shoal("serve", str(tmp_path))
    assert result.returncode == 2 and shard.name in result.stderr
    assert cpu_s() - began_s < 20
    assert "Traceback" not in result.stderr


def test_an_engine_that_cannot_be_built_never_starts(
    tmp_path: Path, checkpoint_dir: Callable[[str], Path]
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("attention: {engine: {kv_cache_bytes: 10}}")
    result = shoal("serve", str(checkpoint_dir("v3")), "--config", str(settings))
    assert result.returncode == 2 and "kv_cache_bytes" in result.stderr


def test_traces_without_their_packages_never_start(
    tmp_path: Path, checkpoint_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").touch()  # found before the real one
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = shoal("serve", str(checkpoint_dir("v3")), "--traces")
    assert result.returncode == 2
    assert "opentelemetry.sdk is missing; pip install 'shoal-serve[otel]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "pip install 'shoal-serve[otel]'" in " ".join(shoal("doctor").stdout.split())


def test_an_application_with_traces_is_refused_without_their_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with warnings.catch_warnings():  # Ray imports what pydantic deprecates
        warnings.simplefilter("ignore")
        from cluster.app import build_app
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"opentelemetry.sdk.trace is missing; pip install"):
        build_app({"runtime_dir": "/tmp", "observability": {"traces": True}})


def test_a_taken_port_is_named(checkpoint_dir: Callable[[str], Path]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = shoal("serve", str(checkpoint_dir("v3")), "--http-port", str(port))
    assert result.returncode == 2 and str(port) in result.stderr


STARTS = """
import sys
import cluster.app, cluster.ingress, cluster.placement, cluster.session
from cluster import machine_code
from cluster.config import default_model
from cluster.model_store import check_model
check_model(default_model())
machine_code.is_missing()
print(sorted({"torch", "numba"} & sys.modules.keys()))
"""


def test_who_computes_nothing_imports_neither_torch_nor_numba() -> None:
    """Who starts a cluster, the directory and an ingress: some four seconds of a core each."""
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
