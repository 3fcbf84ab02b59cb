"""The attention tier: requests, latent KV cache, the decode loop. It knows token ids, never text.

messages.py   what crosses the boundary: Submit, Abort, StepOutputs, Stats
client.py     how the ingress calls a worker; worker.py: the plain class behind it (build.py)
engine.py     the step loop: schedule, run, update (scheduler.py, kv_cache.py, request.py: no torch)
runner.py     a schedule becomes tensors, a forward pass and sampled ids (model.py, sampler.py)
model.py      the decoder over flat token batches (mla.py, rope.py, layers.py, weights.py, kernels/)
step_meter.py what a step took and for whom; tracing.py: spans of it (trace_context.py: whose)
device_model.py   the same on a GPU (device_*.py); graphs.py: its steps, recorded in segments

Glossary: T tokens in a step, S sequences, H heads; n, r, v = qk_nope, qk_rope and v head dims;
c = kv_lora_rank. Latent: what the cache keeps of a token and layer, `kv_c` (c values) and then the
rotated `k_pe` (r values).
"""
