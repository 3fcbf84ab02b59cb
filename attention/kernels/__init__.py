"""Kernels of the attention worker: paged absorbed MLA decode."""
