"""Triton kernels of the expert tier, each beside its plain-torch twin. Nothing here waits for the
GPU, reads a value back or allocates by a value: every function can be captured in a CUDA graph."""
