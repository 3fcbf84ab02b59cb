"""Triton kernels of the router, each beside its plain-torch twin; see experts/kernels/gpu."""
