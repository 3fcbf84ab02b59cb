"""What one token costs a GPU at full efficiency, and what it sends over the network. Pure.

Nothing here depends on a batch or on how many GPUs there are, except how many of them a token
reaches. The gate, norms and sampling are left out: below 1 % of the matrices.
"""

from __future__ import annotations

from cluster.deploy.hardware import Gpu, Network
from cluster.deploy.matrices import BF16_BYTES, FLOAT32_BYTES, SCALE_BLOCK
from cluster.deploy.sizes import ModelSizes
from experts.config import ModelConfig

# ---- decode


def matmul_s(sizes: ModelSizes, gpu: Gpu) -> float:
    """Projections, dense FFNs and shared experts in the type of the weights, the head in bf16."""
    head_s = 2 * sizes.embedding_params / gpu.bf16_flops_per_s
    return 2 * sizes.attention_matmul_params / gpu.flops_per_s(sizes.weights) + head_s


def core_compute_s(sizes: ModelSizes, gpu: Gpu, context_tokens: int) -> float:
    """Absorbed core attention over the cache, in bf16."""
    return context_tokens * sizes.core_flops_per_context_token() / gpu.bf16_flops_per_s


def core_read_s(sizes: ModelSizes, gpu: Gpu, context_tokens: int) -> float:
    """Reading the cache of one sequence, in bf16."""
    return context_tokens * sizes.cache_bytes_per_token() / gpu.bandwidth_bytes_per_s


def attention_s(sizes: ModelSizes, gpu: Gpu, context_tokens: int) -> float:
    """GPU time of one token on the attention side."""
    core_s = max(
        core_compute_s(sizes, gpu, context_tokens), core_read_s(sizes, gpu, context_tokens)
    )
    return matmul_s(sizes, gpu) + core_s


def expert_s(sizes: ModelSizes, gpu: Gpu) -> float:
    """GPU time of one token's routed experts, when batches are large."""
    return 2 * sizes.routed_params_per_token / gpu.flops_per_s(sizes.weights)


def gpu_ratio(sizes: ModelSizes, gpu: Gpu, context_tokens: int) -> float:
    """Attention GPUs that keep one expert GPU busy."""
    return attention_s(sizes, gpu, context_tokens) / expert_s(sizes, gpu)


def decode_bound(sizes: ModelSizes, gpu: Gpu, context_tokens: int) -> float:
    """Tokens/s per GPU, all GPUs of both tiers counted, that nothing can exceed."""
    return 1 / (attention_s(sizes, gpu, context_tokens) + expert_s(sizes, gpu))


# ---- prefill


def prefill_s(sizes: ModelSizes, gpu: Gpu, prompt_tokens: int) -> float:
    """GPU time of one prompt token of both tiers: naive attention over half the prompt on average,
    no head."""
    matmul_flops = sizes.flops_per_token - 2 * sizes.embedding_params
    core_flops = prompt_tokens / 2 * sizes.core_flops_per_context_token("naive")
    return matmul_flops / gpu.flops_per_s(sizes.weights) + core_flops / gpu.bf16_flops_per_s


# ---- experts


def experts_touched(num_experts: int, experts_per_token: int, tokens: float) -> float:
    """Expected experts of a layer that so many randomly routed tokens need."""
    return float(num_experts * (1 - (1 - experts_per_token / num_experts) ** tokens))


def tokens_to_fill(sizes: ModelSizes, gpu: Gpu) -> float:
    """Tokens of a micro-batch, all sequences together, from which on computing the experts takes
    longer than reading their weights."""
    config = sizes.config
    bytes_per_param = sizes.expert_bytes / sizes.expert_params
    ridge = gpu.flops_per_s(sizes.weights) / gpu.bandwidth_bytes_per_s
    tokens_per_expert = ridge * bytes_per_param / 2
    return tokens_per_expert * config.n_routed_experts / config.num_experts_per_tok


# ---- network


def dispatch_bytes(sizes: ModelSizes) -> int:
    """A token's hidden state on its way to one device, for one layer: in the type of the weights,
    fp8 with a float32 scale for 128 values. Ids and gate weights (some 48 bytes) left out."""
    hidden = sizes.config.hidden_size
    if sizes.weights == "fp8":
        return hidden + -(-hidden // SCALE_BLOCK) * FLOAT32_BYTES
    return hidden * (FLOAT32_BYTES if sizes.weights == "float32" else BF16_BYTES)


def return_bytes(sizes: ModelSizes) -> int:
    """What one device sends back for it: the sum over its experts."""
    return sizes.config.hidden_size * (FLOAT32_BYTES if sizes.weights == "float32" else BF16_BYTES)


def destinations(config: ModelConfig, devices: int) -> float:
    """Devices that one token's experts of a layer are on.

    A group-limited model reaches at most `topk_group`, as groups stay whole; otherwise the expected
    number for uniformly random experts, evenly spread.
    """
    if config.is_group_limited:
        return min(config.topk_group, devices)
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    if devices >= experts:
        return float(chosen)
    per_device = experts / devices
    missed = 1.0
    for i in range(chosen):
        missed *= max(0.0, experts - per_device - i) / (experts - i)
    return devices * (1 - missed)


def port_limit(sizes: ModelSizes, network: Network, num_destinations: float) -> float:
    """Tokens/s through one port: what comes back is more than what goes out."""
    per_layer = return_bytes(sizes) + (dispatch_bytes(sizes) if network.is_shared else 0)
    return network.bytes_per_s / (sizes.num_moe_layers * num_destinations * per_layer)
