"""`shoal doctor`: what this machine has, and what will be in the way."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table

from cluster.observability.traces import INSTALL, missing_package

PINNED = {"ray": "2.60.0", "torch": "2.13.0"}
MIN_MEMORY_BYTES = 3 << 30
MIN_SHM_BYTES = 256 << 20
SHM = "/dev/shm"  # noqa: S108 - where Ray keeps its object store
PORTS = {8000: "HTTP", 9000: "gRPC", 8265: "dashboard"}


@dataclass(frozen=True)
class Finding:
    """One checked thing; `level` is ok, warning or error."""

    name: str
    level: Literal["ok", "warning", "error"]
    text: str


def examine() -> list[Finding]:
    """All findings, cheap ones first."""
    machine = [_python(), *_versions(), _memory(), _shm(), *_ports(), _kernels(), _device()]
    return [*machine, _token(), _traces()]


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"
    return Finding("python", "ok" if sys.version_info >= (3, 11) else "error", text)


def _versions() -> list[Finding]:
    findings = []
    for name, wanted in PINNED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "error", f"missing: pip install {name}=={wanted}"))
            continue
        same = found.partition("+")[0] == wanted
        text = found if same else f"{found}, tested with {wanted}"
        findings.append(Finding(name, "ok" if same else "warning", text))
    return findings


def _memory() -> Finding:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{available / 2**30:.1f} GiB free of {total / 2**30:.1f}"
    if total < MIN_MEMORY_BYTES:
        return Finding("memory", "warning", f"{text}: the local cluster needs about 3 GiB")
    return Finding("memory", "ok", text)


def _shm() -> Finding:
    try:
        free = shutil.disk_usage(SHM).free
    except OSError:
        return Finding(SHM, "warning", "missing: Ray falls back to slower files")
    level: Literal["ok", "warning"] = "ok" if free >= MIN_SHM_BYTES else "warning"
    return Finding(SHM, level, f"{free / 2**20:.0f} MiB free")


def _ports() -> list[Finding]:
    findings = []
    for port, use in PORTS.items():
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        text = "in use" if taken else "free"
        findings.append(Finding(f"port {port} ({use})", "warning" if taken else "ok", text))
    return findings


def _kernels() -> Finding:
    from experts.kernels.runtime import kernels

    found = kernels()
    return Finding("CPU kernels", "ok" if found.compiled else "warning", found.reason)


def _device() -> Finding:
    """What `device: auto` is on this machine, and why."""
    import torch

    from experts.device import open_device

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = open_device("auto")
    more = f", {count} of them" if count > 1 else ""
    slow = chosen.is_cuda and chosen.kernels != "triton"
    return Finding("device", "warning" if slow else "ok", f"{chosen.reason}{more}")


def _token() -> Finding:
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return Finding("Ray token", "warning", "RAY_AUTH_MODE=disabled: Ray's ports are open")
    return Finding("Ray token", "ok", "on; the dashboard asks for the text of ~/.ray/auth_token")


def _traces() -> Finding:
    missing = missing_package()
    text = f"no {missing}, which `--traces` needs: {INSTALL}" if missing else "OpenTelemetry"
    return Finding("traces", "ok", text)


def render(findings: list[Finding]) -> Table:
    """A table for people."""
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    table = Table("check", "", "finding", box=None)
    for finding in findings:
        level = f"[{colours[finding.level]}]{finding.level}[/]"
        table.add_row(finding.name, level, escape(finding.text))
    return table
