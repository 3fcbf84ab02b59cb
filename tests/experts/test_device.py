"""Where a process computes: every way to the CPU has a reason, `cuda` never falls back."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts.device import (
    ComputeDevice,
    CudaProbe,
    DeviceError,
    choose_device,
    open_device,
    probe_cuda,
    triton_missing,
)

H200 = CudaProbe(
    name="NVIDIA H200",
    capability=(9, 0),
    num_sms=132,
    total_bytes=141_000_000_000,
    shared_bytes=227 << 10,
)
A100 = CudaProbe(
    name="NVIDIA A100",
    capability=(8, 0),
    num_sms=108,
    total_bytes=80_000_000_000,
    shared_bytes=163 << 10,
)
T4 = CudaProbe(name="Tesla T4", capability=(7, 5), num_sms=40, total_bytes=16_000_000_000)
NO_CUDA = CudaProbe("this torch was built without CUDA")


def test_auto_takes_a_gpu_that_can_be_used() -> None:
    chosen = choose_device("auto", H200)
    assert chosen == ComputeDevice(
        torch.device("cuda", 0),
        torch.bfloat16,
        "triton",
        "NVIDIA H200, Triton kernels",
        fp8_matmul=True,
        num_sms=132,
        total_bytes=141_000_000_000,
    )
    assert chosen.is_cuda and not chosen.is_host


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (NO_CUDA, "CPU: this torch was built without CUDA"),
        (T4, "CPU: Tesla T4 has compute capability 7.5, the kernels need 8.0"),
    ],
)
def test_auto_falls_back_and_says_why(probe: CudaProbe, reason: str) -> None:
    chosen = choose_device("auto", probe)
    assert chosen.is_host and not chosen.is_cuda
    assert (chosen.reason, chosen.dtype, chosen.total_bytes) == (reason, torch.float32, 0)


@pytest.mark.parametrize(
    ("probe", "why"),
    [
        (NO_CUDA, "this torch was built without CUDA"),
        (T4, "Tesla T4 has compute capability 7.5, the kernels need 8.0"),
    ],
)
def test_cuda_never_falls_back(probe: CudaProbe, why: str) -> None:
    with pytest.raises(DeviceError) as raised:
        choose_device("cuda", probe)
    assert str(raised.value) == f"device cuda: {why}; use --device cpu, or auto"


def test_small_blocks_have_tiles_of_their_own_before_sm_90() -> None:
    small = replace(H200, name="L40S", capability=(8, 9), shared_bytes=99 << 10)
    assert choose_device("cuda", small).reason == "L40S, Triton kernels"
    chosen = choose_device("cuda", replace(small, name="RTX 5090", capability=(12, 0)))
    assert chosen.kernels == "torch"
    why = "its blocks have 99 KiB of shared memory, the Triton kernels need 163"
    assert chosen.reason == f"RTX 5090, plain torch ({why})"


def test_cpu_is_taken_although_there_is_a_gpu() -> None:
    assert choose_device("cpu", H200).reason == "CPU: asked for"


@pytest.mark.parametrize(
    ("triton_missing", "kernels", "reason"),
    [
        ("no module named triton", "", "NVIDIA H200, plain torch (no module named triton)"),
        ("", "torch", "NVIDIA H200, plain torch (SHOAL_KERNELS=torch)"),
    ],
)
def test_twins_run_where_triton_cannot_or_shall_not(
    triton_missing: str, kernels: str, reason: str
) -> None:
    chosen = choose_device("auto", replace(H200, triton_missing=triton_missing), kernels)
    assert (chosen.kernels, chosen.reason, chosen.is_cuda) == ("torch", reason, True)


def test_fp8_is_multiplied_as_it_is_only_where_there_are_instructions_for_it() -> None:
    assert not choose_device("auto", A100).fp8_matmul
    assert choose_device("auto", H200).fp8_matmul


@pytest.mark.parametrize(("share", "num_bytes"), [(0.25, 20e9), (1, 80e9), (2, 80e9)])
def test_a_share_of_a_gpu_is_a_share_of_its_memory(share: float, num_bytes: float) -> None:
    assert choose_device("cuda", A100, share=share).total_bytes == num_bytes


def test_the_choice_of_this_process_is_logged_with_what_it_may_see(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with caplog.at_level(logging.INFO, "experts.device"):
        chosen = open_device("cpu")
    assert chosen.is_host
    assert caplog.messages == ["device: CPU: asked for (CUDA_VISIBLE_DEVICES=3)"]


def test_triton_needs_a_compiler_for_its_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The one that CC names and no other, else gcc or clang."""
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    why = "Triton's launcher needs a C compiler, no {} here: install gcc"
    assert triton_missing() == why.format("gcc or clang")
    (tmp_path / "clang").touch(mode=0o755)
    assert "C compiler" not in triton_missing()
    monkeypatch.setenv("CC", "cc-13")
    assert triton_missing() == why.format("cc-13")
    (tmp_path / "cc-13").touch(mode=0o755)
    assert "C compiler" not in triton_missing()


def test_triton_needs_the_headers_of_python_for_its_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    header = tmp_path / "Python.h"
    why = f"Triton's launcher needs {header}: install Python's headers (python3-dev)"
    assert triton_missing() == why
    header.touch()
    assert triton_missing() == ""


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_named() -> None:
    assert probe_cuda().missing == "this torch was built without CUDA"


def test_what_torch_says_of_the_driver_is_part_of_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_available() -> bool:
        warnings.warn(
            "The NVIDIA driver on your system is too old (found version 11040). "
            "(Triggered internally at CUDAFunctions.cpp:119.)",
            stacklevel=2,
        )
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    missing = probe_cuda().missing
    assert missing.startswith("torch finds no GPU and driver that it can use (CUDA_VISIBLE")
    assert missing.endswith("): The NVIDIA driver on your system is too old (found version 11040).")
