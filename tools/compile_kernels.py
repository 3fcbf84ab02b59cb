"""Compile every Triton kernel for GPUs that are not there, and hold it to their limits.

    python tools/compile_kernels.py [--target sm_90] [--only NAME] [--json FILE]

The wrappers of */kernels/gpu run on meta tensors under a driver whose launches compile for the
target and record instead of running: what is compiled is the launch configuration that a GPU would
get, and a wrapper that reads a value from the device fails, as a meta tensor has none. Each package
lists its cases: `cases(native_fp8)` in kernels/gpu/cases.py yields (name, call).

Shared memory: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"
(163 KiB a block on 8.0, 99 on 8.9, 227 on 9.0 and 10.0); registers there too. Registers and stack
are read from the machine code by Triton's cuobjdump, matrix instructions from the PTX: mma,
Hopper's wgmma, Blackwell's tcgen05.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

CASES = tuple(f"{package}.kernels.gpu.cases" for package in ("experts", "router", "attention"))
SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
}
MAX_REGISTERS = 255
REGISTERS_PER_BLOCK = 65536
MAX_STACK_BYTES = {"sm_80": 64, "sm_89": 64, "sm_90": 64, "sm_100": 160}
"""Spilled registers of a thread: a few around the inner loop. Nothing is tuned for sm_100 yet; MLA
decode over an fp8 cache spills 136 bytes there."""
MAX_GRID_YZ = 65535

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_MATRIX = re.compile(r"\b(wgmma|tcgen05|mma)\.(?:mma|sync)")
_DOT_OPERAND = re.compile(r"tt\.dot .*: tensor<[0-9x]*x(\w+)>")


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel as a target would get it. `dots`: operand types of its matrix products."""

    case: str
    target: str
    kernel: str
    constants: dict[str, str]
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    dots: list[str]
    matrix_instructions: list[str]
    seconds: float

    @property
    def broken_limits(self) -> list[str]:
        """What this launch must not do, in words; empty if all is well."""
        threads = 32 * self.num_warps
        max_shared, max_stack = SHARED_BYTES[self.target], MAX_STACK_BYTES[self.target]
        is_fp8 = any(dot.startswith("f8") for dot in self.dots)
        is_narrow = bool(set(self.dots) - {"f32"})
        rules = {
            f"shared memory {self.shared_bytes} > {max_shared} bytes":
                self.shared_bytes > max_shared,
            f"{self.registers} registers > {MAX_REGISTERS}": self.registers > MAX_REGISTERS,
            f"{self.registers} registers x {threads} threads > {REGISTERS_PER_BLOCK}":
                self.registers * threads > REGISTERS_PER_BLOCK,
            f"stack {self.stack_bytes} > {max_stack} bytes": self.stack_bytes > max_stack,
            f"grid {self.grid}": max(self.grid[1:]) > MAX_GRID_YZ,
            "a product of narrow types without matrix instructions":
                is_narrow and not self.matrix_instructions,
            "fp8 products, which sm_80 has not": is_fp8 and self.target == "sm_80",
        }  # fmt: skip
        return [rule for rule, broken in rules.items() if broken]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A case on a target: its launches, or why it could not be compiled."""

    case: str
    target: str
    launches: list[Launch] = field(default_factory=list)
    error: str = ""

    @property
    def failures(self) -> list[str]:
        if self.error:
            return [self.error]
        return [f"{la.kernel}: {rule}" for la in self.launches for rule in la.broken_limits]


class CompileOnlyDriver:
    """What Triton asks a driver for, without a GPU; `record` hears of every launch."""

    def __init__(self, target: GPUTarget, record: Callable[..., None]) -> None:
        self._target = target
        self._record = record
        self._started_s = 0.0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": sys.maxsize},
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        """Triton keeps what it compiled by device."""
        return f"sm_{self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        """The first thing that a launch asks for."""
        self._started_s = perf_counter()
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Triton makes one a kernel and calls it with the grid for every launch."""

        def launch(*args: Any) -> None:
            self._record(source, metadata, args[:3], perf_counter() - self._started_s)

        return launch


@contextmanager
def compile_only(arch: int, case: str = "") -> Iterator[list[Launch]]:
    """Inside, kernels called on meta tensors are compiled for sm_<arch>; their launches are listed.

    TRITON_INTERPRET must not be set when the kernels are imported.
    """
    launches: list[Launch] = []
    target = f"sm_{arch}"

    def record(source: Any, metadata: Any, grid: tuple[int, int, int], seconds: float) -> None:
        names = source.fn.arg_names
        launches.append(
            Launch(
                case=case,
                target=target,
                kernel=metadata.name,
                constants={names[at[0]]: str(value) for at, value in source.constants.items()},
                grid=grid,
                num_warps=metadata.num_warps,
                num_stages=metadata.num_stages,
                shared_bytes=metadata.shared,
                seconds=seconds,
                **_inspect(metadata.hash, metadata.name),
            )
        )

    drivers = triton.runtime.driver
    drivers.set_active(CompileOnlyDriver(GPUTarget("cuda", arch, 32), record))
    try:
        yield launches
    finally:
        drivers.set_active(None)  # the next use looks for a GPU again


@cache
def _inspect(key: str, name: str) -> dict[str, Any]:
    """What the compiler's files say of a kernel."""
    files = get_cache_manager(key)
    ttir, ptx = (Path(files.get_file(f"{name}.{kind}")).read_text() for kind in ("ttir", "ptx"))
    command = [_CUOBJDUMP, "--dump-resource-usage", files.get_file(f"{name}.cubin")]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "dots": sorted(set(_DOT_OPERAND.findall(ttir))),
        "matrix_instructions": sorted(set(_MATRIX.findall(ptx))),
    }


def list_cases(module: str, target: str) -> dict[str, Callable[[], object]]:
    """ "package/name" -> call, of a module with `cases`; empty if there is no such module."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return {}
    package = module.partition(".")[0]
    return {f"{package}/{name}": call for name, call in found.cases(target != "sm_80")}


def compile_case(module: str, name: str, target: str) -> Outcome:
    """Compile all that one case launches."""
    call = list_cases(module, target)[name]
    with compile_only(int(target.removeprefix("sm_")), name) as launches:
        try:
            call()
        except Exception as error:  # whatever the compiler fails with is the outcome
            return Outcome(name, target, launches, f"{type(error).__name__}: {error}")
    return Outcome(name, target, launches, "" if launches else "launches no kernel")


def compile_all(
    modules: list[str], targets: list[str], only: list[str], jobs: int
) -> list[Outcome]:
    """All cases whose name contains one of `only`, in `jobs` processes."""
    tasks = [
        (module, name, target)
        for target in targets
        for module in modules
        for name in list_cases(module, target)
        if any(part in name for part in only)
    ]
    with ProcessPoolExecutor(jobs, get_context("fork")) as processes:  # torch is imported once
        futures = [processes.submit(compile_case, *task) for task in tasks]
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("compiling", total=len(tasks))
            for future in as_completed(futures):
                outcome = future.result()
                title = f"{outcome.case} {outcome.target}"
                progress.update(bar, advance=1, description=title)
                for failure in outcome.failures:
                    progress.console.print(f"{title}: {failure}")
    return [future.result() for future in futures]


def table_of(outcomes: list[Outcome]) -> Table:
    """One line a launch."""
    table = Table(box=None)
    for heading in ("case", "target", "kernel"):
        table.add_column(heading, overflow="fold")
    for heading in ("shared KiB", "registers", "stack B", "warps", "stages", "s"):
        table.add_column(heading, justify="right")
    table.add_column("matrix instructions")
    for outcome in outcomes:
        for la in outcome.launches:
            numbers = (la.registers, la.stack_bytes, la.num_warps, la.num_stages)
            table.add_row(
                la.case, la.target, la.kernel, f"{la.shared_bytes / 1024:.1f}",
                *map(str, numbers), f"{la.seconds:.1f}", " ".join(la.matrix_instructions),
                style="red" if la.broken_limits else None,
            )  # fmt: skip
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", choices=SHARED_BYTES, help="default: all")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="cases whose name contains it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cases", action="append", metavar="MODULE", help="default: our packages")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: the kernels would be the interpreter's")
    targets = args.target or list(SHARED_BYTES)
    modules = args.cases or list(CASES)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        outcomes = compile_all(modules, targets, args.only or [""], args.jobs)
    for module in modules:
        if not list_cases(module, targets[0]):
            print(f"{module}: no such module", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    Console(width=None if sys.stdout.isatty() else 160).print(table_of(outcomes))
    failures = [f"{o.case} {o.target}: {failure}" for o in outcomes for failure in o.failures]
    print(f"{len(outcomes)} cases, {len(failures)} failures", *failures, sep="\n")
    return 1 if failures or not outcomes else 0


if __name__ == "__main__":
    raise SystemExit(main())
