"""Poisoned memory: what a kernel leaves unwritten shows in its result."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN, or -77 where numbers are whole."""
    empty = torch.empty

    def poisoned_empty(*args, **kwargs) -> Tensor:
        out = empty(*args, **kwargs)
        if out.dtype == torch.float8_e4m3fn:
            return out.view(torch.uint8).fill_(0x7F).view(out.dtype)
        return out.fill_(math.nan if out.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned_empty)
