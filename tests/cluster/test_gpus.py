"""Who gets how much of a GPU, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import ConfigError, parse_config
from cluster.gpus import divide_gpus

ONE_AND_TWO: dict[str, Any] = {"attention": {"num_workers": 1}, "experts": {"num_workers": 2}}


def shares(settings: dict[str, Any], num_visible: int | None) -> tuple[float | None, ...]:
    """num_gpus of attention, experts and router."""
    config = divide_gpus(parse_config(settings), num_visible).config
    return config.attention.num_gpus, config.experts.num_gpus, config.router.num_gpus


@pytest.mark.parametrize(
    ("num_visible", "share"),
    [(0, 0), (1, 0.3333), (2, 0.5), (3, 1), (8, 1), (None, 0)],
)
def test_workers_get_whole_gpus_or_equal_parts(num_visible: int | None, share: float) -> None:
    assert shares(ONE_AND_TWO, num_visible) == (share, share, 0)


@pytest.mark.parametrize("num_visible", [1, 2, 3, 8])
def test_all_workers_find_room_in_parts_that_ray_can_reserve(num_visible: int) -> None:
    for num_workers in range(1, 40):
        settings = {"attention": {"num_workers": 1}, "experts": {"num_workers": num_workers}}
        share = shares(settings, num_visible)[0]
        assert share and int(1 / share + 1e-9) * num_visible >= 1 + num_workers
        assert round(share * 10_000) == pytest.approx(share * 10_000, abs=1e-6)


def test_room_is_kept_for_the_workers_that_load_may_add() -> None:
    scaling = {"num_workers": 2, "scaling": {"min_workers": 2, "max_workers": 3}}
    assert shares({"experts": scaling}, 1) == (0.25, 0.25, 0)


def test_what_a_tier_says_stands() -> None:
    assert shares({"experts": {"num_workers": 2, "num_gpus": 0.5}}, 2) == (1, 0.5, 0)
    assert shares({"attention": {"num_gpus": 0}}, 2) == (0, 1, 0)
    assert shares({"attention": {"device": "cpu"}}, 2) == (0, 1, 0)
    assert shares({"device": "cpu"}, 8) == (0, 0, 0)
    assert shares({"device": "cpu", "experts": {"num_gpus": 1}}, 0) == (0, 0, 0)
    assert shares({"router": {"num_gpus": 1, "mode": "inline"}}, 3) == (1, 1, 1)
    assert shares({"device": "cpu", "experts": {"device": "auto"}}, 2) == (0, 1, 0)


def test_the_reason_is_told() -> None:
    told = [divide_gpus(parse_config(ONE_AND_TWO), n).reason for n in (0, 1, 3, None)]
    assert told == [
        "",
        "1 GPU to divide among 3 attention and expert workers: num_gpus 0.3333 each",
        "3 GPUs to divide among 3 attention and expert workers: a whole one each",
        "",
    ]


@pytest.mark.parametrize(
    ("settings", "num_visible", "text"),
    [
        ({"device": "cuda"}, 0, "attention shall compute on a GPU, none is seen here"),
        ({"device": "cuda"}, None, "attention.num_gpus is missing"),
        ({"device": "cuda", "experts": {"num_gpus": 0.5}}, 1, "others take all that are here"),
        ({"experts": {"num_gpus": 1}}, 1, "ask for 2 GPUs (experts 2), here are 1"),
        ({"router": {"num_gpus": 0.5}}, 0, "ask for 0.5 GPUs (router 0.5), here are 0"),
    ],
)
def test_what_nobody_can_reserve_is_an_error_and_no_wait(
    settings: dict[str, Any], num_visible: int | None, text: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        divide_gpus(parse_config(settings), num_visible)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"experts": {"num_gpus": 1.5}}, "experts.num_gpus = 1.5: Ray reserves a part of one GPU"),
        ({"experts": {"num_gpus": 0.00001}}, "parts of 0.0001"),
        ({"experts": {"num_gpus": -1}}, "experts.num_gpus = -1"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"device": "cuda", "attention": {"num_gpus": 0}}, "device cuda for attention"),
        ({"experts": {"device": "cuda", "num_gpus": 0}}, "device cuda for experts"),
        ({"router": {"device": "cuda"}}, "device cuda for router"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(settings)
    assert text in str(raised.value)


def test_the_device_of_a_tier_wins_over_the_application_s() -> None:
    config = parse_config({"device": "cuda", "experts": {"device": "cpu"}})
    assert [config.device_of(tier) for tier in ("attention", "experts", "router")] == [
        "cuda",
        "cpu",
        "cuda",
    ]


def test_a_router_shares_a_gpu_only_if_told_to() -> None:
    config = divide_gpus(parse_config({"device": "auto", "router": {"num_gpus": 0.1}}), 2).config
    assert config.may_use_gpu("router") and config.attention.num_gpus == 0.3333
    assert not divide_gpus(parse_config({}), 2).config.may_use_gpu("router")
