"""A step never asks the device for a value: it runs on meta tensors, which have none.

Kernels are launched with the arguments and the grid that a GPU would get, and do nothing; that each
of them can be compiled and what it computes are other tests' business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.device_model import DeviceDecoder
from attention.device_sampling import greedy_ids
from experts.device import ComputeDevice
from experts.staging import Staging
from router.local import LocalMoe
from tests.attention.harness import Rig, Sequences
from tests.gpu.device_rig import device_model
from tests.reference import prompts

META = ComputeDevice(
    torch.device("meta"), torch.bfloat16, "triton", "test", fp8_matmul=True, num_sms=132
)
RigOf = Callable[[str], Rig]


class OneWay(Staging):
    """To the device only."""

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to("meta") for tensor in tensors)

    def to_host(self, x: Tensor) -> Any:
        raise AssertionError(f"the host waits for {tuple(x.shape)} {x.dtype}")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were launched."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []

    def launch(self: Any, *args: Any, **settings: Any) -> None:
        names.append(self.fn.__name__)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    yield names


def meta_model(rig: Rig, cache_dtype: torch.dtype, deterministic: bool) -> DeviceDecoder:
    moe = LocalMoe.open(rig.checkpoint, META, deterministic=deterministic)
    model = device_model(rig, META, moe, cache_dtype, deterministic)
    model._staging = OneWay(META)
    return model


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("preset", "cache_dtype"), [("v2-lite", torch.bfloat16), ("v3fp8", torch.float8_e4m3fn)]
)
def test_no_step_reads_a_value_from_the_device(
    preset: str, cache_dtype: torch.dtype, deterministic: bool, rig: RigOf, launched: list[str]
) -> None:
    """Naive chunks beside decodes, short absorbed ones, decodes; logits; the largest of each."""
    model = meta_model(rig(preset), cache_dtype, deterministic)
    naive = [] if deterministic else [2, 3]
    sequences = Sequences(model, prompts())
    for chunks in ({0: 1, 2: 40, 3: 100}, {3: 9, 2: 9}, {1: 3, 2: 2}, {1: 1, 2: 1, 3: 1}):
        launched.clear()
        sequences.step(chunks, naive=[i for i in naive if chunks.get(i, 0) > 5])
        assert launched
    assert greedy_ids(sequences.logits[1][-1]).device.type == "meta"


def test_a_model_on_meta_tensors_would_notice(rig: RigOf, launched: list[str]) -> None:
    model = meta_model(rig("v2-lite"), torch.bfloat16, False)
    advance = model._advance

    def curious(*args: Any) -> None:
        advance(*args)
        model._buffers.hidden.sum().item()

    model._advance = curious  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="meta"):
        Sequences(model, prompts()).step({0: 1})
