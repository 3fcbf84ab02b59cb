"""The process that runs the units: `child.py --spec FILE --report FD`; see supervise.py."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from serving.processes import exit_at_sigterm

from experts.device import ComputeDevice, open_device
from gpu_check.environment import describe
from gpu_check.plan import Context, Unit, plan, run_unit
from gpu_check.rows import Note, to_message
from gpu_check.timing import CudaTimer, NoTimer

UNIT_TIMEOUT_S, OVERTIME_S = 150.0, 30.0
"""A unit that does not end within this, or so long after the end of its section, takes the process
with it. Cold compiles are included."""
BROKEN_EXIT = 3
"""The device does not answer any more, as after an illegal access: only a new process can go on."""

Emit = Callable[[dict[str, Any]], None]


def main() -> None:
    """Report the device, the number of units, then every unit's rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--report", required=True, type=int)
    arguments = parser.parse_args()
    os.set_inheritable(arguments.report, False)
    spec = json.loads(Path(arguments.spec).read_text())
    exit_at_sigterm()
    with os.fdopen(arguments.report, "w", buffering=1) as report:

        def emit(message: dict[str, Any]) -> None:
            report.write(json.dumps(message, allow_nan=False) + "\n")

        context = open_context(spec["smoke"])
        emit({"device": describe(context.device)})
        units = plan(context, spec["sections"])
        emit({"num_units": len(units)})
        run_units(context, units, spec, emit)


def run_units(context: Context, units: list[Unit], spec: dict[str, Any], emit: Emit) -> None:
    """Those from spec["first"] on, but what its section has no time left for. Does not return after
    a capture that failed."""
    skipped = -1
    for number, unit in enumerate(units[spec["first"] :], spec["first"]):
        left_s = spec["ends_s"][unit.section] - time.monotonic()
        if left_s <= 0:
            if unit.section != skipped:
                emit(to_message(out_of_time(spec["sections"], units[number:])))
            skipped = unit.section
            continue
        emit({"begin": number, "name": unit.name})
        faulthandler.dump_traceback_later(min(UNIT_TIMEOUT_S, left_s + OVERTIME_S), exit=True)
        for row in run_unit(unit):
            emit(to_message(row))
        if context.timer.capture_failure:
            text = f"timed by launches, not as a graph: {context.timer.capture_failure}"
            emit(to_message(Note(unit.name, text, failed=False)))
            emit({"next": number + 1})
            os._exit(0)  # what would run at exit may meet the broken capture
        _tidy(context)
    faulthandler.cancel_dump_traceback_later()


def open_context(smoke: bool) -> Context:
    """On the GPU; smoke: on the CPU, with Triton's interpreter."""
    if smoke:
        torch.set_num_threads(1)
        device = ComputeDevice(torch.device("cpu"), torch.float32, "triton", "smoke")
        return Context(device, NoTimer(), smoke)
    compute = open_device("cuda")
    torch.cuda.set_device(compute.device)
    return Context(compute, CudaTimer(), smoke)


def out_of_time(sections: list[str], units: list[Unit]) -> Note:
    """What is not run of the section of the first of these units."""
    section = units[0].section
    num_left = sum(unit.section == section for unit in units)
    return Note(sections[section], f"not run: out of time with {num_left} units left", failed=True)


def _tidy(context: Context) -> None:
    """Give the unit's memory back. Does not return if the device is lost."""
    gc.collect()
    if context.device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(BROKEN_EXIT)  # what would run at exit needs the device


if __name__ == "__main__":
    main()
