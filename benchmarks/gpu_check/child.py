"""The process that runs the units: `child.py --spec FILE --report FD`; see supervise.py."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from serving.processes import exit_at_sigterm

from experts.device import ComputeDevice, open_device
from gpu_check.environment import describe
from gpu_check.plan import Context, plan, run_unit
from gpu_check.rows import Note, to_message
from gpu_check.timing import CudaTimer, NoTimer

UNIT_TIMEOUT_S = 400.0
"""A kernel that does not end within this takes the process with it. Cold compiles are included."""
BROKEN_EXIT = 3
"""The device does not answer any more, as after an illegal access: only a new process can go on."""


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
        for number in range(spec["first"], len(units)):
            emit({"begin": number, "name": units[number].name})
            faulthandler.dump_traceback_later(UNIT_TIMEOUT_S, exit=True)
            for row in run_unit(units[number]):
                emit(to_message(row))
            if context.timer.capture_failure:
                text = f"timed by launches, not as a graph: {context.timer.capture_failure}"
                emit(to_message(Note(units[number].name, text, failed=False)))
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
