"""What the attention kernels share: one product of tiles.

Numbers and pointers that change from step to step are neither constants nor specialised in any of
them (`do_not_specialize`): a compilation in the middle of serving takes seconds. What is a constant
has few values, all of them met in DeviceDecoder.warm_up.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

_INTERPRETED: Final = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply_add(a, b, total):
    """total + a . b in float32; a and b of one type, float32 ones without rounding to tf32."""
    if _INTERPRETED and a.dtype == tl.bfloat16:  # it would multiply their bits as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
