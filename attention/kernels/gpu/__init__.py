"""Triton kernels of the attention tier, each beside its plain-torch twin; see
experts/kernels/gpu."""
