"""What the figures were measured on."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

UNKNOWN = "unknown"


def describe(device: torch.device) -> dict[str, str]:
    """The fields of `rows.DEVICE_FIELDS`."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "no GPU (CPU, interpreter)"
    return {
        "name": name,
        "slug": slug(name) if on_gpu else "smoke",
        "driver": _driver() if on_gpu else "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "none",
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def slug(name: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """Short hash, with a + when files differ from it."""
    here = str(Path(__file__).parent)
    return _output("git", "-C", here, "describe", "--always", "--dirty=+", "--exclude=*")


def _driver() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.partition("\n")[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return UNKNOWN
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or UNKNOWN
