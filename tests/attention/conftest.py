"""Rigs of the small checkpoints, one a session each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attention.harness import Rig


@pytest.fixture(scope="session")
def rig(checkpoint_dir: Callable[[str], Path]) -> Iterator[Callable[[str], Rig]]:
    """`rig("v3")`: checkpoint and experts of a preset."""
    rigs: dict[str, Rig] = {}

    def get(preset: str) -> Rig:
        if preset not in rigs:
            rigs[preset] = Rig(checkpoint_dir(preset))
        return rigs[preset]

    yield get
    for made in rigs.values():
        made.close()
