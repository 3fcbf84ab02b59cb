"""Where a process computes: chosen once, at its start, and the reason kept and logged.

`host`: the CPU kernels over the mapped checkpoint, float32 (experts/kernels/runtime.py). `triton`:
the kernels of */kernels/gpu over weights in the memory of a device. `torch`: their plain-torch
twins, same signatures, on the same tensors: oracle and fall-back, and how a machine without a GPU
runs everything but the kernels.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

logger = logging.getLogger(__name__)

DeviceName = Literal["auto", "cpu", "cuda"]
KernelKind = Literal["host", "triton", "torch"]

MIN_CAPABILITY = (8, 0)
"""bfloat16 matrix instructions and asynchronous copies begin here (sm_80)."""
FP8_CAPABILITY = (8, 9)
"""fp8 matrix instructions begin here; below it fp8 weights are multiplied as bfloat16."""

SMALL_BLOCK_BYTES, MIN_SHARED_BYTES = 99 * 1024, 163 * 1024
"""Shared memory that the kernels' tiles are made for: of sm_86 and sm_89, of sm_80 and later ones.
sm_120 has 99 KiB too, and no tiles that fit."""


class DeviceError(ValueError):
    """The device that was asked for cannot be used; str() says why and what to do."""


@dataclass(frozen=True, slots=True)
class CudaProbe:
    """What this process can see of CUDA. `missing`: why there is none, empty if there is."""

    missing: str = ""
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    num_sms: int = 0
    total_bytes: int = 0
    shared_bytes: int = 0
    """Shared memory that a block of threads may have."""
    triton_missing: str = ""
    """Why Triton cannot be used, empty if it can."""


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """A device and how tensors lie on it. `dtype` is that of activations and plain weights."""

    device: torch.device
    dtype: torch.dtype
    kernels: KernelKind
    reason: str
    fp8_matmul: bool = False
    """fp8 weights are multiplied with fp8 activations; else with `dtype` ones."""
    num_sms: int = 1
    total_bytes: int = 0
    """Memory of the GPU that this process may use: its share."""

    @property
    def is_host(self) -> bool:
        """The CPU kernels over mapped weights, without a copy of them."""
        return self.kernels == "host"

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def host_device(reason: str = "asked for") -> ComputeDevice:
    """The CPU kernels."""
    return ComputeDevice(torch.device("cpu"), torch.float32, "host", f"CPU: {reason}")


def choose_device(
    asked: DeviceName, probe: CudaProbe, kernels: str = "", share: float = 1.0
) -> ComputeDevice:
    """Pure. kernels: the value of SHOAL_KERNELS, `torch` for the twins. share: the part of a GPU
    that is reserved for this process; more than one GPU is used as one. Raises DeviceError."""
    why_not = probe.missing
    if not why_not and probe.capability < MIN_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (probe.capability, MIN_CAPABILITY))
        why_not = f"{probe.name} has compute capability {have}, the kernels need {need}"
    if asked == "cuda" and why_not:
        raise DeviceError(f"device cuda: {why_not}; use --device cpu, or auto")
    if asked == "cpu" or why_not:
        return host_device("asked for" if asked == "cpu" else why_not)
    twins = "SHOAL_KERNELS=torch" if kernels == "torch" else _no_triton_kernels(probe)
    how = f"plain torch ({twins})" if twins else "Triton kernels"
    return ComputeDevice(
        torch.device("cuda", 0),
        torch.bfloat16,
        "torch" if twins else "triton",
        f"{probe.name}, {how}",
        fp8_matmul=probe.capability >= FP8_CAPABILITY,
        num_sms=probe.num_sms,
        total_bytes=int(min(share, 1.0) * probe.total_bytes),
    )


def _no_triton_kernels(probe: CudaProbe) -> str:
    """Why the Triton kernels cannot run on this GPU, empty if they can."""
    needed = SMALL_BLOCK_BYTES if probe.capability < (9, 0) else MIN_SHARED_BYTES
    if probe.triton_missing or probe.shared_bytes >= needed:
        return probe.triton_missing
    have, need = probe.shared_bytes // 1024, needed // 1024
    return f"its blocks have {have} KiB of shared memory, the Triton kernels need {need}"


def probe_cuda() -> CudaProbe:
    """Look at the first GPU that this process may use (Ray shows it the ones it reserved)."""
    if torch.version.cuda is None:
        return CudaProbe("this torch was built without CUDA")
    with warnings.catch_warnings(record=True) as told:  # that the driver is too old, for one
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
    if not is_available:
        found = f"torch finds no GPU and driver that it can use ({_visible()})"
        reasons = [str(warning.message).partition(" (Triggered")[0] for warning in told]
        return CudaProbe(": ".join([found, *reasons]))
    properties = torch.cuda.get_device_properties(0)
    return CudaProbe(
        name=properties.name,
        capability=(properties.major, properties.minor),
        num_sms=properties.multi_processor_count,
        total_bytes=properties.total_memory,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        triton_missing=triton_missing(),
    )


def triton_missing() -> str:
    """Why Triton cannot be used here, empty if it can."""
    try:
        import triton  # noqa: F401 - whether it can be imported
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        missing = " or ".join(compilers)
        return f"Triton's launcher needs a C compiler, no {missing} here: install gcc"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")  # as Triton looks
    if not header.exists():
        return f"Triton's launcher needs {header}: install Python's headers (python3-dev)"
    return ""


def _visible() -> str:
    """The GPUs that Ray, or whoever started this process, lets it see."""
    return f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}"


def open_device(asked: DeviceName = "auto", share: float = 1.0) -> ComputeDevice:
    """The device of this process; call once, at its start. Raises DeviceError."""
    kernels = os.environ.get("SHOAL_KERNELS", "")
    probe = CudaProbe("asked for the CPU") if asked == "cpu" else probe_cuda()
    chosen = choose_device(asked, probe, kernels, share)
    logger.info("device: %s (%s)", chosen.reason, _visible())
    return chosen
