"""Members wired to a directory: what they make of the settings and of the snapshot."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError, parse_config
from cluster.errors import ServerOverloaded
from cluster.inline import InlineCluster
from cluster.limits import Limits
from experts.messages import Drain
from tests.fakes import TIMEOUT_S


def test_a_drained_expert_worker_says_so_to_the_policy(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    tier = {"num_workers": 3, "redundancy": 48}
    config = parse_config({"model": str(checkpoint_dir("v3")), "experts": tier})
    with InlineCluster(config) as cluster:
        first, *others = cluster.experts
        assert not any(member.read_stats().is_drained for member in cluster.experts)
        cluster.ingress._line.command(Drain(worker_id=first.worker.worker_id))
        deadline_s = time.monotonic() + TIMEOUT_S
        while not first.read_stats().is_drained and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert first.read_stats().is_drained
        assert not any(member.read_stats().is_drained for member in others)


@pytest.mark.parametrize(
    ("settings", "served_here", "behind_a_file"),
    [
        ({}, True, False),
        ({"listen": {"host": "192.0.2.1"}}, False, False),
        ({"enable_operations": True, "listen": {"host": "192.0.2.1"}}, True, True),
        ({"enable_operations": False}, False, False),
    ],
)
def test_only_who_opens_the_ports_turns_commands_on(
    settings: dict[str, Any], served_here: bool, behind_a_file: bool
) -> None:
    config = parse_config(settings)
    assert bool(config.served_here().enable_operations) is served_here
    assert bool(config.enable_operations) is behind_a_file


def test_an_ingress_takes_commands_only_if_told_to(checkpoint_dir: Callable[[str], Path]) -> None:
    model = str(checkpoint_dir("v3"))
    for enabled in (True, None):
        with InlineCluster(parse_config({"model": model, "enable_operations": enabled})) as cluster:
            paths = set(cluster.ingress.http_app().openapi()["paths"])
            assert ("/v1/scale" in paths) is bool(enabled)


def test_an_ingress_has_the_limits_of_its_settings(checkpoint_dir: Callable[[str], Path]) -> None:
    given = {"max_open_sequences": 5000, "slow_client_s": 7.5}
    config = parse_config({"model": str(checkpoint_dir("v3")), "limits": given})
    with InlineCluster(config) as cluster:
        service = cluster.ingress.service
        assert service.limits == Limits(max_open_sequences=5000, slow_client_s=7.5)
        service._admission.enter(5000)
        with pytest.raises(ServerOverloaded):
            service._admission.enter(1)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_open_sequences": 0}, "limits.max_open_sequences"),
        ({"max_top_logprobs": 129}, "limits.max_top_logprobs"),
        ({"max_body_bytes": 2**24 + 1}, "limits.max_body_bytes"),
        ({"slow_client_s": "nan"}, "limits.slow_client_s"),
        ({"max_open_sequence": 5}, "max_open_sequences"),
    ],
)
def test_limits_are_bounded(limits: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config({"limits": limits})
