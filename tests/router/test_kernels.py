"""The kernels as plain Python, which they stay where they cannot be compiled."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import numpy as np
import pytest

from router.kernels import place, select


@pytest.fixture
def load_plain(monkeypatch: pytest.MonkeyPatch):
    """Loads a second copy of a kernel module, not compiled."""
    monkeypatch.setenv("SHOAL_KERNELS", "torch")

    def load(module: ModuleType) -> ModuleType:
        spec = importlib.util.spec_from_file_location("plain_kernels", module.__file__)
        assert spec is not None
        assert spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    return load


@pytest.mark.parametrize("softmax", [False, True])
def test_select_is_the_same(softmax: bool, load_plain) -> None:
    plain = load_plain(select)
    assert not hasattr(plain.select_experts, "py_func")
    rng = np.random.default_rng(0)
    logits, bias = rng.normal(size=(20, 16)).astype(np.float32), rng.normal(size=16)
    results = []
    for module in (plain, select):
        ids, weights = np.empty((20, 4), np.int64), np.empty((20, 4), np.float32)
        bad_row = module.select_experts(
            logits, bias.astype(np.float32), 4, 2, softmax, True, True, 2.5, ids, weights
        )
        assert bad_row == -1
        results.append((ids, weights))
    (ids, weights), (compiled_ids, compiled_weights) = results
    assert np.array_equal(ids, compiled_ids)
    np.testing.assert_allclose(weights, compiled_weights, rtol=1e-5)


def test_plan_is_the_same(load_plain) -> None:
    plain = load_plain(place)
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(30), 4)
    experts = np.concatenate([np.sort(rng.choice(12, 4, replace=False)) for _ in range(30)])
    holders = rng.integers(-1, 5, (12, 3)).astype(np.int32)
    weights = rng.random(120).astype(np.float32)
    usable, load = np.array([True, True, False, True, True]), np.arange(5)
    expected = place.plan(rows, experts, weights, holders, usable, load)
    for array, same in zip(
        expected, plain.plan(rows, experts, weights, holders, usable, load), strict=True
    ):
        assert array.dtype == same.dtype
        assert np.array_equal(array, same)
