"""The gates of a checkpoint's main layers."""

from __future__ import annotations

import torch
from torch import Tensor

from experts.checkpoint import Checkpoint, CheckpointError
from experts.device import ComputeDevice
from experts.linear import Weight
from router.gate import DeviceGate, GateWeights
from router.tensor_shapes import gate_names, gate_tensor_shapes


def load_gates(checkpoint: Checkpoint) -> dict[int, GateWeights]:
    """Layer -> its gate, upcast to float32. Raises CheckpointError."""
    config = checkpoint.config
    checkpoint.require(gate_tensor_shapes(config))
    return {layer: _load_gate(checkpoint, layer) for layer in config.moe_layers}


def load_device_gates(checkpoint: Checkpoint, device: ComputeDevice) -> dict[int, DeviceGate]:
    """Layer -> a copy of its gate on the device. Raises CheckpointError."""
    config = checkpoint.config
    checkpoint.require(gate_tensor_shapes(config))
    return {layer: _load_device_gate(checkpoint, layer, device) for layer in config.moe_layers}


def _load_gate(checkpoint: Checkpoint, layer: int) -> GateWeights:
    weight = checkpoint.weight(gate_names(layer)[0])
    return GateWeights(Weight(weight.dequantize()), _load_bias(checkpoint, layer))


def _load_device_gate(checkpoint: Checkpoint, layer: int, device: ComputeDevice) -> DeviceGate:
    weight, bias = checkpoint.weight(gate_names(layer)[0]), _load_bias(checkpoint, layer)
    values = weight.data if weight.data.dtype is torch.bfloat16 else weight.dequantize()
    return DeviceGate(values.to(device.device), None if bias is None else bias.to(device.device))


def _load_bias(checkpoint: Checkpoint, layer: int) -> Tensor | None:
    """[E] float32; None where the model has none."""
    name = gate_names(layer)[1]
    if checkpoint.config.topk_method != "noaux_tc":
        return None
    bias = checkpoint.tensor(name).float()
    if not bool(torch.isfinite(bias).all()):
        file = checkpoint.info(name).file
        raise CheckpointError(file, "finite biases", "NaN or infinity", name)
    return bias
