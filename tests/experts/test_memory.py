"""Slots of a GPU: their size, and how many would fit where too many were asked for."""

from __future__ import annotations

import pytest

from cluster.deploy.known_models import known_model
from experts.config import ModelConfig
from experts.memory import check_slots, slot_bytes

V2_LITE, V3 = known_model("v2-lite"), known_model("v3")
GB = 10**9


def test_bytes_of_a_slot() -> None:
    assert slot_bytes(V2_LITE.config) == 3 * 1408 * 2048 * 2
    assert slot_bytes(V3.config) == 3 * (2048 * 7168 + 4 * 16 * 56)
    odd = ModelConfig.model_validate(
        V3.config.model_dump(by_alias=True) | {"moe_intermediate_size": 130, "hidden_size": 200}
    )
    assert slot_bytes(odd) == 3 * (130 * 200 + 4 * 2 * 2)


@pytest.mark.parametrize("sizes", [V2_LITE, V3])
def test_planning_counts_the_same_bytes(sizes: object) -> None:
    assert slot_bytes(sizes.config) == sizes.expert_bytes  # type: ignore[attr-defined]


def test_slots_that_fit_pass_and_one_more_does_not() -> None:
    model = V2_LITE.config
    share = 48 * GB
    room = int(0.9 * share) // slot_bytes(model)
    check_slots(room, model, share, 0.9)
    with pytest.raises(ValueError) as raised:
        check_slots(room + 1, model, share, 0.9)
    assert str(raised.value) == (
        f"{room + 1} slots of 17.3 MB do not fit into gpu_memory_utilization 0.9 of 48.00 GB, "
        f"{room} do: set experts.slots_per_worker to {room} or less with more expert workers, or "
        "raise experts.num_gpus"
    )
