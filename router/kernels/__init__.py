"""CPU kernels of the router: choosing experts and choosing their replicas."""
