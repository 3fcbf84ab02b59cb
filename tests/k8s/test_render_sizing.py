"""Slots, caches and memory follow from the model and the hardware; what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import ConfigError
from cluster.deploy.sizing import GIB, size
from tests.k8s.deployments import application_args, deployment, templates


def refusal(preset: str = "gpu-large", **changes: Any) -> str:
    """What is said of a deployment that cannot be."""
    with pytest.raises(ConfigError) as error:
        size(deployment(preset, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


class TestExperts:
    def test_the_pool_holds_every_expert_and_an_eighth_more(self) -> None:
        # V3: 58 layers of 256 experts in 8 groups: units of 32, 464 of them; an eighth is 58.
        sizing = size(deployment("gpu-large"))
        assert sizing.redundancy == 58 * 32
        assert sizing.slots_per_worker == 33 * 32  # 522 units on 16 workers, rounded up

    def test_spare_slots_make_up_for_a_pod(self) -> None:
        # 16 workers in two pods: the 8 that are left need 464 / 8 = 58 units, they have 33.
        assert size(deployment("gpu-large")).spare_slots_per_worker == (58 - 33) * 32

    def test_spare_slots_are_no_more_than_there_is_room_for(self) -> None:
        # 80 GB: 72 usable are 51 units of 1.41 GB; 58 would be wanted.
        sizing = size(deployment("gpu-large", experts={"gpu": "h100-80"}))
        assert sizing.slots_per_worker + (sizing.spare_slots_per_worker or 0) == 51 * 32

    def test_less_redundancy_where_an_eighth_has_no_room(self) -> None:
        # 10 H100: 510 units have room, 464 are experts.
        config = deployment("gpu-large", experts={"gpu": "h100-80", "gpus_per_pod": 5, "pods": 2})
        assert size(config).redundancy == (510 - 464) * 32

    def test_too_few_gpus_are_refused_with_what_would_do(self) -> None:
        said = refusal(experts={"pods": 1, "gpu": "a100-80"})
        assert "experts.pods = 1: 8 a100-80 (8 a pod) hold 13056 of v3's 14848 experts" in said
        assert "experts.pods = 2" in said
        assert "6 h200, 10 h100-80" in said

    def test_more_redundancy_than_room_is_refused_with_how_much_there_is(self) -> None:
        said = refusal("gpu-small", experts={"redundancy": 5000})
        assert "experts.redundancy = 5000" in said
        room = int(said.partition("have room for ")[2].split()[0])
        assert size(deployment("gpu-small", experts={"redundancy": room})).redundancy == room

    def test_an_unknown_gpu_is_refused_with_the_known_ones(self) -> None:
        assert "h200" in refusal(experts={"gpu": "h201"})

    def test_on_cpus_every_expert_fits_as_a_view_of_the_file(self) -> None:
        assert "spare_slots_per_worker" not in application_args(deployment("cpu-dev"))["experts"]


class TestCache:
    def test_takes_what_weights_leave(self) -> None:
        # facts of V3: 70,272 bytes a token; about 1.5 million tokens beside the weights of an H200.
        tokens = size(deployment("gpu-large")).kv_cache_bytes / 70_272
        assert 1.4e6 < tokens < 1.6e6

    def test_takes_what_is_asked_for(self) -> None:
        config = deployment("gpu-large", attention={"cache_tokens": 1000})
        assert application_args(config)["attention"]["engine"]["kv_cache_bytes"] == 1000 * 70_272

    def test_is_float32_on_a_cpu(self) -> None:
        # The embedded model: 2 bytes a value in bf16, 4 on the CPU.
        few, more = (
            size(deployment("cpu-dev", attention={"cache_tokens": n})).kv_cache_bytes
            for n in (16, 32)
        )
        assert more == 2 * few
        assert few % (16 * 4) == 0

    def test_without_room_it_is_refused_with_how_much_there_is(self) -> None:
        said = refusal(attention={"gpu": "l40s", "cache_tokens": 1_000_000})
        assert "attention.gpu = 'l40s'" in said
        assert "one of h200, b200" in said
        tokens = int(said.partition("cache_tokens = ")[2].split()[0])
        fits = {"gpu": "l40s", "cache_tokens": tokens}
        assert size(deployment("gpu-large", attention=fits)).kv_cache_bytes == tokens * 70_272


class TestMemory:
    def test_of_a_pod_with_gpus_is_its_processes(self) -> None:
        # Ray 1, shared memory 1, 8 workers of 6, 4 routers of 0.5 GiB.
        assert size(deployment("gpu-large")).attention_memory_bytes == 52 * GIB
        assert size(deployment("gpu-large")).experts_memory_bytes == 50 * GIB

    def test_of_a_pod_on_cpus_includes_the_weights(self) -> None:
        # V2-Lite: 26 layers of 64 experts of 17.3 MB, on two workers, without second replicas.
        changes = {"gpu": None, "gpus_per_pod": 0, "redundancy": 0, "workers_per_pod": 1}
        pod = size(deployment("gpu-small", experts=changes)).experts_memory_bytes
        weights = 26 * 64 // 2 * 3 * 2048 * 1408 * 2
        assert pod == -(-(2.5 * GIB + weights) // GIB) * GIB

    def test_goes_into_the_pods(self) -> None:
        resources = templates(deployment("gpu-large"))["experts"]["containers"][0]["resources"]
        assert resources["limits"]["memory"] == "50Gi"

    def test_may_be_more_than_needed_but_not_less(self) -> None:
        assert size(deployment(experts={"memory_gib": 100})).experts_memory_bytes == 100 * GIB
        said = refusal(experts={"memory_gib": 8})
        assert said.startswith("experts.memory_gib = 8: ")
        assert "take 50.0 GiB" in said
