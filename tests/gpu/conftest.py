"""Fixtures of the attention tier, for its tests on a device."""

from tests.attention.conftest import rig  # noqa: F401 - a fixture
