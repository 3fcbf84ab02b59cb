"""Fixtures of the router's tests: a small checkpoint and pools of expert workers over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experts.checkpoint import Checkpoint
from tests.router.pool import NewPool, Pool


@pytest.fixture
def checkpoint(checkpoint_dir: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint_dir("v2-lite"))


@pytest.fixture
def new_pool() -> Iterator[NewPool]:
    """Makes pools that are closed at the end of the test."""
    pools: list[Pool] = []

    def make(*args: object, **kwargs: object) -> Pool:
        pools.append(Pool(*args, **kwargs))  # type: ignore[arg-type]
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def socket_folder(tmp_path: Path) -> Path:
    """Where unix sockets may lie: nobody else can write there."""
    tmp_path.chmod(0o700)
    return tmp_path
