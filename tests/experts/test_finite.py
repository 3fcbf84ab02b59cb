"""Looking for NaN and infinity: compiled and plain, every kind of float."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from experts.kernels.finite import all_finite

PLAIN = getattr(all_finite, "py_func", all_finite)


@pytest.mark.parametrize("check", [all_finite, PLAIN])
@pytest.mark.parametrize(
    ("value", "finite"),
    [
        (0.0, True),
        (-0.0, True),
        (3.4e38, True),
        (-3.4e38, True),
        (1e-45, True),
        (np.inf, False),
        (-np.inf, False),
        (np.nan, False),
        (-np.nan, False),
    ],
)
def test_one_value_decides(check: Callable[..., bool], value: float, finite: bool) -> None:
    values = np.ones((3, 5), np.float32)
    values[2, 4] = value
    assert check(values) == finite


@pytest.mark.parametrize("shape", [(0, 4), (1, 1)])
def test_small_shapes(shape: tuple[int, int]) -> None:
    assert all_finite(np.zeros(shape, np.float32))
