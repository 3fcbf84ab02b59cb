"""CPU kernels of the expert worker, shared by the packages above."""
