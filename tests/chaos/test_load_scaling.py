"""The experts' tier follows the load while requests run; only with --chaos-long."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.conftest import SETTINGS
from tests.chaos.deployment import Deployment, deployed, until
from tests.chaos.records import Expected
from tests.chaos.trial import Chaos, Trial

pytestmark = [pytest.mark.chaos, pytest.mark.alone]

FEWEST, MOST = 2, 4
QUICK = {"upscale_delay_s": 1.0, "downscale_delay_s": 5.0, "settle_s": 2.0, "window_s": 3.0}
# Twelve pairs a token, three layers of four experts: two workers keep up with 250 tokens a second.
PACED = {
    **SETTINGS,
    "experts": {
        "num_workers": FEWEST,
        "redundancy": 48,
        "emulated_pairs_per_s": 1500.0,
        "scaling": {"min_workers": FEWEST, "max_workers": MOST, **QUICK},
    },
}
SCALING_TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def paced(checkpoint_dir: Callable[[str], Path], long: bool) -> Iterator[Deployment]:
    """Expert workers that are slow by themselves, so that two cores suffice for many."""
    if not long:
        pytest.skip("only with --chaos-long")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with deployed(checkpoint_dir("v3"), PACED, folder) as found:
        yield found
    shutil.rmtree(folder, ignore_errors=True)


def follow(chaos: Chaos, trial: Trial, workers: int) -> None:
    """Until the load has made the tier so large."""
    chaos.deployment.wanted["experts"] = workers
    began_s = time.monotonic()
    until(chaos.deployment.missing, SCALING_TIMEOUT_S, f"not {workers} expert workers")
    trial.disturbed(began_s, lasting_s=time.monotonic() - began_s)


def test_the_experts_follow_the_load_up_and_down(
    paced: Deployment,
    requests_pool: list[dict[str, Any]],
    expected: list[Expected],
    trials: list[Trial],
) -> None:
    chaos = Chaos(paced, requests_pool, expected, long=True, trials=trials)
    with chaos.trial("scale up by load") as up:
        chaos.settle()
        follow(chaos, up, MOST)
    with chaos.trial("scale down by load", num_streams=2) as down:
        chaos.settle()
        follow(chaos, down, FEWEST)
    for trial in (up, down):
        assert trial.gap_p99_s <= max(0.4, 5 * trial.itl_s)
