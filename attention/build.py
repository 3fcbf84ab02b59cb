"""An engine from a checkpoint: the one place that knows both ways to compute it."""

from __future__ import annotations

import numpy as np
import torch

from attention.compiled import entry_points
from attention.config import AttentionConfig
from attention.engine import Engine
from attention.kv_cache import BlockPool
from attention.memory import CachePlan, cache_room, plan_cache
from attention.model import Decoder, DecoderModel
from attention.runner import ModelRunner
from attention.scheduler import Scheduler
from attention.tracing import Tracer
from attention.weights import load_weights
from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from router.client import MoeClient

Parts = tuple[Decoder, CachePlan]


def build_engine(
    checkpoint: Checkpoint,
    moe: MoeClient,
    config: AttentionConfig,
    device: ComputeDevice | None = None,
    tracer: Tracer | None = None,
) -> Engine:
    """Weights, cache, model, scheduler and engine of one worker, ready for requests: kernels are
    compiled or loaded, steps recorded. device: the host if not given. Raises CheckpointError,
    ValueError."""
    model, eos_token_ids = checkpoint.config, frozenset(checkpoint.config.eos_token_ids)
    if device is None or device.is_host:
        decoder, plan = _on_host(checkpoint, moe, config)
    else:
        decoder, plan = _on_device(checkpoint, moe, config, device)
    pool = BlockPool(plan.num_blocks, plan.block_size, config.enable_prefix_caching)
    return Engine(
        ModelRunner(decoder, plan.block_size, eos_token_ids),
        Scheduler(config, pool, plan.max_model_len),
        eos_token_ids,
        model.vocab_size,
        moe,
        tracer=tracer,
    )


def _on_host(checkpoint: Checkpoint, moe: MoeClient, config: AttentionConfig) -> Parts:
    entry_points()  # now, not in the first request
    model = checkpoint.config
    plan = plan_cache(config, model)
    # numpy's zeros are pages that the system hands out at first touch: memory grows with use
    # (torch.zeros writes them all: 512 MiB resident at once).
    shape = (model.num_hidden_layers, plan.num_blocks, plan.block_size, model.latent_width)
    cache = torch.from_numpy(np.zeros(shape, np.float32))
    decoder = DecoderModel(
        model, load_weights(checkpoint), moe, cache, plan.max_model_len, config.deterministic
    )
    return decoder, plan


def _on_device(
    checkpoint: Checkpoint, moe: MoeClient, config: AttentionConfig, device: ComputeDevice
) -> Parts:
    from attention.device_model import DeviceDecoder  # a CPU worker needs no GPU kernels
    from attention.device_weights import load_device_weights
    from attention.kernels.gpu.cache_layout import CacheLayout

    model, weights = checkpoint.config, load_device_weights(checkpoint, device)
    room = cache_room(device.total_bytes, config.gpu_memory_utilization, weights.num_bytes)
    plan = plan_cache(config, model, on_gpu=True, room_bytes=room)
    layout = CacheLayout(model.kv_lora_rank, model.qk_rope_head_dim, _cache_dtype(config, device))
    decoder = DeviceDecoder(
        model,
        weights,
        moe,
        layout.new_cache(model.num_hidden_layers, plan.num_blocks, plan.block_size, device.device),
        device,
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        use_graphs=config.cuda_graphs,
        deterministic=config.deterministic,
    )
    decoder.warm_up()
    return decoder, plan


def _cache_dtype(config: AttentionConfig, device: ComputeDevice) -> torch.dtype:
    """Raises ValueError for one that the kernels cannot read beside their queries."""
    if config.kv_cache_dtype == "fp8":
        return torch.float8_e4m3fn
    if config.kv_cache_dtype != "auto" and getattr(torch, config.kv_cache_dtype) != device.dtype:
        raise ValueError(
            f"kv_cache_dtype {config.kv_cache_dtype}: this device computes in {device.dtype}, its "
            "cache is of that dtype or fp8: use auto or fp8"
        )
    return device.dtype
