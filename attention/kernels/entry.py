"""The compiled entry points of this package; importing it compiles or loads them."""

import ctypes

from attention.kernels.heads import heads_driver
from attention.kernels.mla_body import attend_chunks, merge_chunks, mla_driver
from attention.kernels.rows import norm_driver, rotate_driver
from experts.kernels.runtime import entry_point

multiply_heads = entry_point(None, heads_driver)
norm = entry_point(None, norm_driver)
rotate_and_store = entry_point(None, rotate_driver)
mla = entry_point(ctypes.c_int64, mla_driver)
mla_bodies = attend_chunks.address, merge_chunks.address
