"""After warm_up no step meets a kernel in a form that is not compiled yet: that takes seconds.

On meta tensors, under a driver that compiles nothing: what Triton would compile is only listed. In
a process of its own, as kernels imported here would be the interpreter's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tools.compile_kernels import CompileOnlyDriver

forms = set()
JITFunction._do_compile = lambda self, key, *args: forms.add((self.__name__, key))
driver.set_active(CompileOnlyDriver(GPUTarget("cuda", 90, 32), print))

from attention import device_attention
from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from experts.staging import Staging
from tests.attention.harness import Sequences
from tests.gpu.device_rig import device_model

META = ComputeDevice(
    torch.device("meta"), torch.bfloat16, "triton", "test", fp8_matmul=True, num_sms=132
)


class OneWay(Staging):
    def to_device(self, *tensors):
        return tuple(tensor.to("meta") for tensor in tensors)


class NoExperts:
    accepts_device = True
    num_renormalised = 0

    def begin(self, layer, x, deadline_s=None):
        return x.float()

    def finish(self, ticket):
        return ticket


splits = set()
pick = device_attention.pick_num_splits


def noted(*args, **settings):
    splits.add(pick(*args, **settings))
    return pick(*args, **settings)


device_attention.pick_num_splits = noted
def found(folder):
    forms.clear()
    splits.clear()
    checkpoint = Checkpoint.open(folder)
    rig = SimpleNamespace(checkpoint=checkpoint, config=checkpoint.config)
    model = device_model(
        rig, META, NoExperts(), use_graphs=False, max_model_len=8192, max_num_seqs=64
    )
    model._staging = OneWay(META)
    model.warm_up()
    ready = set(forms)
    sequences = Sequences(model, [[1] * 200] * 64 + [[1] * 7000])
    for num_decodes in (1, 2, 3, 15, 16, 17, 33, 63, 64):
        decodes = dict.fromkeys(range(num_decodes), 1)
        sequences.step(decodes)
        for chunk in (2, 16, 40, 601):  # beside a prompt
            sequences.step(decodes | {64: chunk}, naive=[64])
            sequences.step(decodes | {64: min(chunk, 40)})
    return len(ready), sorted(splits), sorted(name for name, _ in forms - ready)


print(json.dumps([found(Path(folder)) for folder in sys.argv[1:]]))
"""


def test_every_form_is_compiled_at_the_start(checkpoint_dir: Callable[[str], Path]) -> None:
    """Decodes of 1 to 64 rows, alone and beside prompt chunks in both forms."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    folders = [str(checkpoint_dir(preset)) for preset in ("v2-lite", "v3fp8")]
    command = [sys.executable, "-c", SCRIPT, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert not done.returncode, done.stderr
    for num_ready, splits, new in json.loads(done.stdout):
        assert num_ready > 6 and len(splits) > 3, "contexts cut in many ways, or nothing is shown"
        assert new == []
