"""Devices through the whole application: the same tokens, who looks for a GPU, what a failed start
says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attention.messages import SamplingParams, Submit, TokenOutput
from cluster import members
from cluster.config import ConfigError, parse_config
from cluster.gpus import divide_gpus
from cluster.inline import InlineCluster
from cluster.serve_start import start_failure
from experts.device import ComputeDevice, CudaProbe, DeviceError

TWINS = ComputeDevice(torch.device("cpu"), torch.float32, "torch", "test")
"""All code of a GPU but its kernels."""
NUM_TOKENS = 8


def greedy_ids(config: dict[str, Any], device: ComputeDevice | None) -> list[int]:
    """The first answer of an inline cluster."""
    found: list[int] = []
    ended = threading.Event()

    def on_output(output: TokenOutput) -> None:
        found.extend(output.token_ids)
        if output.finish_reason is not None:
            ended.set()

    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    with InlineCluster(parse_config(config), device) as cluster:
        submit = Submit(request_id="a", prompt_ids=list(range(5, 25)), params=params)
        cluster.ingress.pool.submit(submit, on_output)
        assert ended.wait(60)
    return found


@pytest.mark.parametrize("preset", ["v3", "v2-lite"])
def test_the_path_of_a_gpu_gives_the_tokens_of_the_cpu(
    preset: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    engine = {"num_kv_blocks": 8, "max_num_seqs": 2}
    config = {"model": str(checkpoint_dir(preset)), "attention": {"engine": engine}}
    expected = greedy_ids(config, None)
    assert len(expected) == NUM_TOKENS
    assert greedy_ids(config, TWINS) == expected
    assert greedy_ids(config | {"router": {"mode": "inline"}}, TWINS) == expected


def test_a_worker_without_a_reserved_gpu_does_not_look_for_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("experts.device.probe_cuda", lambda: pytest.fail("looked for a GPU"))
    config = divide_gpus(parse_config({"router": {"device": "cpu"}}), None).config
    with caplog.at_level(logging.INFO):
        devices = [members.open_tier_device(config, tier) for tier in ("attention", "router")]
    assert all(device.is_host for device in devices)
    assert caplog.messages[0] == "device: CPU: no GPU is reserved for this worker"
    assert caplog.messages[1].startswith("device: CPU: asked for")


def test_a_worker_gets_the_memory_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = CudaProbe(
        name="card", capability=(9, 0), num_sms=132, total_bytes=1000, shared_bytes=227 << 10
    )
    monkeypatch.setattr("experts.device.probe_cuda", lambda: probe)
    settings = {"experts": {"num_gpus": 0.25}, "attention": {"num_gpus": 1}}
    config = divide_gpus(parse_config(settings), None).config
    assert members.open_tier_device(config, "experts").total_bytes == 250
    assert members.open_tier_device(config, "attention").total_bytes == 1000


def test_spare_slots_are_free_on_the_host_only(checkpoint_dir: Callable[[str], Path]) -> None:
    config = parse_config({"model": str(checkpoint_dir("v3"))})
    model = members.ModelConfig.load(config.model)
    assert members.spare_slots_per_worker(config, model, is_host=True) > 0
    assert members.spare_slots_per_worker(config, model, is_host=False) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_inline_says_that_there_is_no_gpu(checkpoint_dir: Callable[[str], Path]) -> None:
    config = parse_config({"model": str(checkpoint_dir("v3")), "device": "cuda"})
    with pytest.raises(ConfigError, match="none is seen here"):
        InlineCluster(config)


TRACEBACK = """A replica failed to start with exception. Retrying 2 more time(s). Error:
\x1b[36mray::ServeReplica:shoal:Experts.initialize()\x1b[39m
  File "device.py", line 85, in choose_device
{error}
"""


def test_an_error_that_lasts_ends_a_start_at_once() -> None:
    error = "experts.device.DeviceError: device cuda: no GPU; use --device cpu"
    message = TRACEBACK.format(error=error)
    assert start_failure("DEPLOYING", "", ["", message]) == "device cuda: no GPU; use --device cpu"
    assert issubclass(DeviceError, ValueError)


def test_an_error_that_may_pass_is_tried_again_and_told_in_the_end() -> None:
    message = TRACEBACK.format(error="OSError: [Errno 98] Address already in use")
    assert start_failure("DEPLOYING", "", [message]) is None
    told = start_failure("DEPLOY_FAILED", "Failed to update the deployments", [message])
    assert told == "OSError: [Errno 98] Address already in use"


def test_a_start_without_errors_goes_on() -> None:
    assert start_failure("DEPLOYING", "", ["", "1 replica takes long to be scheduled"]) is None
    assert start_failure("DEPLOY_FAILED", "no such import path", [""]) == "no such import path"
