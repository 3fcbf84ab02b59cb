"""How many slots an expert worker has room for on a GPU; pure arithmetic, no torch.

A slot holds one routed expert as the kernels read it: two matrices of f x d and one of d x f, in
bfloat16, or in fp8 with a float32 scale for each block of 128 x 128 if the checkpoint is fp8. On
the host a slot is a view of the mapped file and costs nothing.
"""

from __future__ import annotations

from experts.config import ModelConfig

SCALE_BLOCK = 128


def slot_bytes(model: ModelConfig) -> int:
    """One (layer, expert) on a GPU. V2-Lite: 3 * 1408 * 2048 * 2."""
    f, d = model.moe_intermediate_size, model.hidden_size
    if model.quantization is None:
        return 3 * f * d * 2
    return 3 * (f * d + 4 * -(-f // SCALE_BLOCK) * -(-d // SCALE_BLOCK))


def check_slots(num_slots: int, model: ModelConfig, share_bytes: int, utilization: float) -> None:
    """share_bytes: of the GPU's memory, what the worker may use. Raises ValueError."""
    each = slot_bytes(model)
    room = int(utilization * share_bytes) // each
    if num_slots > room:
        raise ValueError(
            f"{num_slots} slots of {each / 1e6:.1f} MB do not fit into "
            f"gpu_memory_utilization {utilization:g} of {share_bytes / 1e9:.2f} GB, {room} do: "
            f"set experts.slots_per_worker to {room} or less with more expert workers, or raise "
            "experts.num_gpus"
        )
