"""LocalMoe: the numbers of the host path, bits that depend on the row alone, and no host sync."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from router.errors import NonFiniteInput
from router.local import LocalMoe
from tests.reference import Reference
from tests.router.pool import expected, some_rows

TWINS = ComputeDevice(torch.device("cpu"), torch.float32, "torch", "test")
ROOT = Path(__file__).resolve().parents[2]
Folder = Callable[[str], Path]


@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "kimi-k2", "v3fp8", "v3fp8-ragged"])
def test_equals_one_expert_at_a_time(preset: str, checkpoint_dir: Folder) -> None:
    folder = checkpoint_dir(preset)
    checkpoint = Checkpoint.open(folder)
    moe, reference = LocalMoe.open(checkpoint, TWINS), Reference(folder)
    for layer in checkpoint.config.moe_layers:
        x = some_rows(7, checkpoint, seed=layer)
        y, want = moe.finish(moe.begin(layer, x)), expected(reference, layer, x)
        assert y.dtype == torch.float32
        assert float((y - want).norm() / want.norm()) < 1e-5


def test_deterministic_bits_depend_on_the_row_alone(checkpoint_dir: Folder) -> None:
    """In twos: on a CPU torch's sigmoid of 16 numbers has other bits than that of 32."""
    checkpoint = Checkpoint.open(checkpoint_dir("v3"))
    moe = LocalMoe.open(checkpoint, TWINS, deterministic=True)
    layer = checkpoint.config.moe_layers[0]
    x = some_rows(34, checkpoint)
    together = moe.begin(layer, x)
    assert torch.equal(together, torch.cat([moe.begin(layer, two) for two in x.split(2)]))
    assert torch.equal(together.flip(0), moe.begin(layer, x.flip(0)))


def test_rows_that_are_not_finite_are_noted_until_forgotten(checkpoint_dir: Folder) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("v2-lite"))
    moe = LocalMoe.open(checkpoint, TWINS)
    first, second = checkpoint.config.moe_layers[:2]
    x = some_rows(6, checkpoint)
    moe.check(6)
    x[4, 3], x[5, 0] = torch.nan, torch.inf
    moe.begin(first, x)
    moe.begin(second, some_rows(2, checkpoint))  # a good batch must not hide it
    moe.check(4)  # rows 4 and 5 are padding
    with pytest.raises(NonFiniteInput) as caught:
        moe.check(5)
    assert caught.value.row == 4
    moe.forget()
    moe.check(6)


def test_more_rows_than_it_was_made_for_are_refused(checkpoint_dir: Folder) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("v2-lite"))
    moe = LocalMoe.open(checkpoint, TWINS, max_rows=4)
    layer = checkpoint.config.moe_layers[0]
    assert moe.finish(moe.begin(layer, some_rows(4, checkpoint))).shape[0] == 4
    with pytest.raises(ValueError, match="5 rows, this client was made for 4"):
        moe.begin(layer, some_rows(5, checkpoint))


ON_META = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tools.compile_kernels import CompileOnlyDriver

launched = []
JITFunction.run = lambda self, *args, **kwargs: launched.append(self.__name__)
driver.set_active(CompileOnlyDriver(GPUTarget("cuda", 90, 32), print))

from experts.device import ComputeDevice
from experts.device_layer import DeviceSlots
from router.gate import DeviceGate, GateSpec
from router.local import LocalMoe

meta = torch.device("meta")
device = ComputeDevice(meta, torch.bfloat16, "triton", "test", fp8_matmul=True, num_sms=132)
v3 = GateSpec(256, 8, "sigmoid", "top2_sum", 8, 4, True, 2.5)
gate = torch.empty(256, 7168, dtype=torch.bfloat16, device=meta)
gates = {3: DeviceGate(gate, torch.empty(256, device=meta))}
slots = DeviceSlots(256, 2048, 7168, torch.float8_e4m3fn, device)
slot_of = {3: torch.empty(256, dtype=torch.int32, device=meta)}
for deterministic in (False, True):
    moe = LocalMoe(gates, v3, slots, slot_of, deterministic=deterministic)
    for num_rows in (1, 64, 4096):
        x = torch.empty(num_rows, 7168, dtype=torch.bfloat16, device=meta)
        y = moe.finish(moe.begin(3, x))
        assert (y.shape, y.dtype) == (x.shape, torch.float32)
print(len(launched), len(set(launched)))
"""


def test_a_layer_never_asks_the_device() -> None:
    """On tensors without values, where any question is an error; launches are only counted. In a
    process of its own: kernels imported here are the interpreter's."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", ON_META]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert not done.returncode, done.stderr
    num_launches, num_kernels = map(int, done.stdout.split())
    assert num_kernels >= 6 and num_launches >= 6 * num_kernels
