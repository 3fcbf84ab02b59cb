"""float8_e4m3fn in integer arithmetic, for devices without instructions for it.

e4m3 has 4 exponent bits (bias 7), 3 of mantissa, no infinity; 0x7f is NaN, 448 the largest number.
Moved into the bits of a float16 (bias 15) a number becomes itself / 256, also when it is subnormal,
so decoding is two shifts and an exact product. Encoding rounds to nearest even.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode_e4m3(x):
    """float32 in -448..448, or NaN -> the bits of e4m3 as uint8."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # The 20 bits that e4m3 lacks are rounded away; a carry goes into the exponent, as it should.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the step is 2^-9: adding 2^23 leaves the number of steps in the low bits.
    steps = tl.abs(x) * 512.0 + 8388608.0
    subnormal = steps.to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e4m3(code, dtype: tl.constexpr):
    """uint8 bits of e4m3 -> dtype (bfloat16 or float32), exact; NaN becomes +-480."""
    wide = code.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return (half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)
