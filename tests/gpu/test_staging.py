"""Staging: nothing is copied on the CPU, and parts of one copy are the tensors that were packed."""

from __future__ import annotations

import pytest
import torch

from experts.device import ComputeDevice, host_device
from experts.staging import ALIGN_BYTES, Staging, layout, views

TWINS = ComputeDevice(torch.device("cpu"), torch.float32, "torch", "test")


@pytest.mark.parametrize("device", [TWINS, host_device()])
def test_on_the_cpu_it_is_the_identity(device: ComputeDevice) -> None:
    staging, x, ids = Staging(device), torch.randn(3, 5), torch.arange(4)
    assert staging.to_host(x).wait() is x
    assert staging.to_device(x, ids) == (x, ids)


def test_packed_parts_are_aligned_and_the_same() -> None:
    """Odd sizes, an empty one, every row dtype; the buffer is poisoned."""
    given = [
        torch.randn(3, 7).bfloat16(),
        torch.arange(5, dtype=torch.int32),
        torch.empty(0, 4),
        torch.randn(2, 3).to(torch.float8_e4m3fn),
        torch.randn(9),
    ]
    starts, num_bytes = layout(given)
    assert starts == [0, 256, 512, 512, 768]
    assert num_bytes == 1024
    packed = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
    for place, tensor in zip(views(packed, given, starts), given, strict=True):
        place.copy_(tensor)
    for place, tensor in zip(views(packed, given, starts), given, strict=True):
        assert (place.dtype, place.shape) == (tensor.dtype, tensor.shape)
        assert place.data_ptr() % 16 == 0
        assert torch.equal(place.float(), tensor.float())
    assert ALIGN_BYTES % 16 == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_there_and_back_on_a_gpu() -> None:
    device = ComputeDevice(torch.device("cuda", 0), torch.bfloat16, "torch", "test")
    staging = Staging(device)
    x, ids = torch.randn(33, 65).bfloat16(), torch.arange(7, dtype=torch.int32)
    on_device, ids_there = staging.to_device(x, ids)
    assert on_device.is_cuda
    copies = [staging.to_host(on_device + i) for i in range(3)]  # all held: three buffers
    for i, copy in enumerate(copies):
        assert copy.wait().is_pinned()
        assert torch.equal(copy.wait(), x + i)
    assert torch.equal(staging.to_host(ids_there).wait(), ids)
