"""What the figures were measured on: processor, instructions, memory bandwidth.

`python benchmarks/machine.py` prints it as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RELEVANT_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
BANDWIDTH_BYTES = 2**30
BANDWIDTH_RUNS = 8


def describe() -> dict[str, Any]:
    """Processor, cores, instruction sets, memory, load; no bandwidth, that takes seconds."""
    cpu = _cpu_fields()
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "isa": [flag for flag in RELEVANT_FLAGS if flag in flags],
        "l3": cpu.get("cache size", "unknown"),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def read_bandwidth() -> dict[str, float]:
    """Bytes/s of reading by number of threads, from a fresh process: {"1": ..., "2": ...}."""
    found = subprocess.run(
        [sys.executable, __file__, "--bandwidth"], stdout=subprocess.PIPE, text=True, check=True
    )
    bandwidth: dict[str, float] = json.loads(found.stdout)
    return bandwidth


def _cpu_fields() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in first.splitlines())
    }


def _measure_bandwidth() -> dict[str, float]:
    """Sums over 1 GiB, far more than any cache; the best run counts, it is to be a limit."""
    import torch

    values = torch.ones(BANDWIDTH_BYTES // 4)
    found = {}
    for threads in sorted({1, min(2, os.cpu_count() or 1), os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        best_s = min(_time_s(values.sum) for _ in range(BANDWIDTH_RUNS))
        found[str(threads)] = BANDWIDTH_BYTES / best_s
    return found


def _time_s(function: Any) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    if sys.argv[1:] == ["--bandwidth"]:
        print(json.dumps(_measure_bandwidth()))
    else:
        print(json.dumps(describe() | {"read_bytes_per_s": read_bandwidth()}, indent=1))
