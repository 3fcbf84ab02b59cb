"""Fixtures of all tests: small checkpoints, written once a session, and transformers' models."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.reference import Golden

# Before torch or numba are imported, and inherited by child processes: on a shared machine two
# OpenMP threads under load run many times slower than one.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
# No test leaves this machine: without the certificates of all authorities, which each client of
# httpx reads anew, it is made in 2 ms instead of 40.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)
# Before Triton is imported: without a GPU its kernels run in its interpreter, on CPU tensors.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.load_profile("ci")  # the same examples in every run, however slow the machine


def pytest_collection() -> None:
    gc.disable()  # it takes a quarter of the time of importing everything, and finds nothing


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint_dir("v3")`: the folder of a preset of cluster.tiny_checkpoint; read only."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def folder(preset: str) -> Path:
        from cluster.tiny_checkpoint import write_checkpoint

        write_checkpoint(root / preset, preset)
        return root / preset

    return folder


@pytest.fixture(scope="session")
def reference_golden(checkpoint_dir: Callable[[str], Path]) -> Callable[[str], list[Golden]]:
    """`reference_golden("v3")`: what tests/reference.py says about its four prompts, in float32."""

    @cache
    def goldens(preset: str) -> list[Golden]:
        from tests.reference import golden

        return golden(checkpoint_dir(preset))

    return goldens


@pytest.fixture(scope="session")
def hf_model(checkpoint_dir: Callable[[str], Path]) -> Callable[[str], Any]:
    """`hf_model("v3")`: transformers' model in float32, eager attention and experts."""

    @cache
    def model(preset: str) -> Any:
        from tests.huggingface import load_model

        return load_model(checkpoint_dir(preset))

    return model
