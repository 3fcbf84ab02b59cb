"""GPUs and networks to plan with; every figure says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import ConfigError
from cluster.deploy.known_models import suggestion
from cluster.deploy.matrices import WeightType

USABLE_FRACTION = 0.9
"""Of a GPU's memory; the rest is for the driver, kernels and activations."""


@dataclass(frozen=True)
class Gpu:
    """Sustained rates, not peaks: what large dense kernels are taken to reach."""

    name: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float | None
    """None: no fp8 units, fp8 weights are multiplied as bf16."""
    node_network: str
    """Name of the network among the GPUs of a node."""
    products: tuple[str, ...]
    """Values of the node label nvidia.com/gpu.product: nvidia-smi's name, dashes for spaces."""
    source: str

    @property
    def usable_bytes(self) -> float:
        return USABLE_FRACTION * self.memory_bytes

    def flops_per_s(self, weights: WeightType) -> float:
        """For a product with weights of that type; float32 is taken to run as bf16."""
        if weights == "fp8" and self.fp8_flops_per_s is not None:
            return self.fp8_flops_per_s
        return self.bf16_flops_per_s


@dataclass(frozen=True)
class Network:
    """The port of one GPU (or process)."""

    name: str
    bytes_per_s: float
    """Each way; if `is_shared` of all ports together and both ways."""
    hop_latency_s: float
    """From one tier to the other, for the smallest message."""
    source: str
    is_shared: bool = False


_DERATED = "vendor data sheet ({sheet}, dense) x 0.9 bandwidth, x 0.8 FLOP/s, as assumed for H200"
_GPUS = (
    Gpu(
        "h200",
        141e9,
        4.3e12,
        790e12,
        1580e12,
        "nvlink",
        ("NVIDIA-H200",),
        "assumed sustained rates, not measured here: 0.9 of 4.8 TB/s and 0.8 of 989 / 1,979 "
        "TFLOP/s dense in the vendor data sheet",
    ),
    Gpu(
        "h100-80",
        80e9,
        3.0e12,
        790e12,
        1580e12,
        "nvlink",
        ("NVIDIA-H100-80GB-HBM3",),
        _DERATED.format(sheet="H100 SXM: 3.35 TB/s, 989 / 1,979 TFLOP/s"),
    ),
    Gpu(
        "b200",
        180e9,
        7.2e12,
        1800e12,
        3600e12,
        "nvlink5",
        ("NVIDIA-B200",),
        _DERATED.format(sheet="HGX B200: 8 TB/s, 2,250 / 4,500 TFLOP/s"),
    ),
    Gpu(
        "a100-80",
        80e9,
        1.83e12,
        250e12,
        None,
        "nvlink3",
        ("NVIDIA-A100-SXM4-80GB",),
        _DERATED.format(sheet="A100 SXM 80 GB: 2.04 TB/s, 312 TFLOP/s bf16, no fp8"),
    ),
    Gpu(
        "l40s",
        48e9,
        0.78e12,
        290e12,
        586e12,
        "pcie4",
        ("NVIDIA-L40S",),
        _DERATED.format(sheet="L40S: 0.864 TB/s, 362 / 733 TFLOP/s"),
    ),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}
GPU_ALIASES = {"h100": "h100-80", "a100": "a100-80"}

_LINE_RATE = "line rate of one {rate} Gb/s port a GPU; latency assumed"
_NETWORKS = (
    Network("200g", 25e9, 15e-6, _LINE_RATE.format(rate=200)),
    Network("400g", 50e9, 15e-6, _LINE_RATE.format(rate=400)),
    Network("800g", 100e9, 15e-6, _LINE_RATE.format(rate=800)),
    Network("pcie4", 32e9, 15e-6, "vendor data sheet: PCIe 4.0 x16 of L40S, each way"),
    Network("nvlink3", 300e9, 15e-6, "vendor data sheet: NVLink 3 of A100, each way"),
    Network("nvlink", 450e9, 15e-6, "vendor data sheet: NVLink 4 of H100 and H200, each way"),
    Network("nvlink5", 900e9, 15e-6, "vendor data sheet: NVLink 5 of B200, each way"),
    Network(
        "shm",
        10e9,
        100e-6,
        "processes of one host: assumed 10 GB/s of copying in all, 100 us a hop",
        is_shared=True,
    ),
)
NETWORKS = {network.name: network for network in _NETWORKS}


def known_gpu(name: str) -> Gpu:
    """Raises ConfigError that names the nearest one."""
    lowered = name.lower()
    gpu = GPUS.get(GPU_ALIASES.get(lowered, lowered))
    if gpu is None:
        raise ConfigError(f"gpu = {name!r}: {suggestion(name, tuple(GPUS))}")
    return gpu


def known_network(name: str) -> Network:
    """Raises ConfigError that names the nearest one."""
    network = NETWORKS.get(name.lower())
    if network is None:
        raise ConfigError(f"network = {name!r}: {suggestion(name, tuple(NETWORKS))}")
    return network
