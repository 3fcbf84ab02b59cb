"""CPU kernels of the expert worker, shared by the packages above. Weights in, float32 rows out.

runtime.py      which kernels this process uses, configure_threads, warm_up, machine code on disk
threads.py      starts and stops the helper threads           pool.py   the same from compiled code
drivers.py      entry points: a linear layer, a layer of experts, one call each
jobs.py         what the threads do together: blocks of outputs, then gate and factors
product.py      blocks that fit the caches                    tiles.py  the inner loops in registers
elementwise.py  gate, scale, add                              simd.py   16 lanes in LLVM IR
memory.py       raw addresses and an atomic counter            jit.py   small loops
finite.py       looks for NaN and infinity in rows
"""
