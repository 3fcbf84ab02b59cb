"""Vectors of 16 float32 lanes in LLVM IR: loads that convert, fused multiply-add, reductions, exp.

Numba vectorises plain loops too, but then the compiler chooses the order of the additions, and it
may choose differently for another loop, tail or machine. Here every kernel says what it adds to
what: always 16 lanes (two registers on AVX2, four on NEON), always fused multiply-add, always the
same tree over the lanes. So a row's bits do not depend on its batch, threads or neighbours.

Everything here runs while Numba compiles a kernel: `b` is llvmlite's IRBuilder, addresses and
counts are i64 values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils

Builder = Any
Value = Any
Emitter = Callable[[Any, Any], None]
"""Writes the body of a function: (builder, arguments)."""

LANES: Final = 16
F32: Final = ir.FloatType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
VECTOR: Final = ir.VectorType(F32, LANES)
INT_VECTOR: Final = ir.VectorType(I32, LANES)


class Kind(IntEnum):
    """How a weight lies in memory."""

    F32 = 0
    BF16 = 1
    FP8 = 2

    @property
    def element_bytes(self) -> int:
        return (4, 2, 1)[self]


def const(value: int) -> Value:
    return ir.Constant(I64, value)


def lanes_of(element: Any, values: Sequence[float]) -> Value:
    """A constant vector."""
    vector = ir.VectorType(element, len(values))
    return ir.Constant(vector, [ir.Constant(element, value) for value in values])


def fill(element: Any, value: float) -> Value:
    return lanes_of(element, [value] * LANES)


ZERO: Final = ir.Constant(VECTOR, None)
UNDEFINED: Final = ir.Constant(VECTOR, ir.Undefined)


def offset(b: Builder, address: Value, count: Value, size: int) -> Value:
    """address + count * size"""
    return b.add(address, b.mul(count, const(size)))


def load(b: Builder, address: Value, type_: Any = F32, align: int = 4) -> Value:
    value = b.load(b.inttoptr(address, type_.as_pointer()))
    value.align = align
    return value


def store(b: Builder, value: Value, address: Value, align: int = 4) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = align


def broadcast(b: Builder, scalar: Value) -> Value:
    vector = ir.VectorType(scalar.type, LANES)
    first = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(INT_VECTOR, None))


def _intrinsic(b: Builder, name: str, result: Any, arguments: Sequence[Value]) -> Value:
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, signature, name), arguments)


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once."""
    return _intrinsic(b, f"llvm.fma.v{LANES}f32", VECTOR, (x, y, z))


def prefetch(b: Builder, address: Value) -> None:
    """Ask for a cache line in the second level; any address is allowed."""
    pointer = b.inttoptr(address, I8.as_pointer())
    hints = (ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1))  # read, L2, data
    _intrinsic(b, "llvm.prefetch.p0", ir.VoidType(), (pointer, *hints))


def first_lanes(b: Builder, count: Value) -> Value:
    """Mask of the lanes below count (i64)."""
    return b.icmp_signed("<", lanes_of(I32, range(LANES)), broadcast(b, b.trunc(count, I32)))


def _load_lanes(b: Builder, address: Value, element: Any, suffix: str, mask: Value | None) -> Value:
    """16 elements; under a mask the others read as 0 and their memory is not touched."""
    vector, size = ir.VectorType(element, LANES), _size_of(element)
    if mask is None:
        return load(b, address, vector, size)
    pointer = b.inttoptr(address, vector.as_pointer())
    arguments = (pointer, ir.Constant(I32, size), mask, ir.Constant(vector, None))
    return _intrinsic(b, f"llvm.masked.load.v{LANES}{suffix}.p0", vector, arguments)


def _size_of(element: Any) -> int:
    return 4 if element == F32 else int(element.width) // 8


def load_f32(b: Builder, address: Value, mask: Value | None = None) -> Value:
    return _load_lanes(b, address, F32, "f32", mask)


def store_f32(b: Builder, value: Value, address: Value, mask: Value | None = None) -> None:
    if mask is None:
        store(b, value, address)
        return
    pointer = b.inttoptr(address, VECTOR.as_pointer())
    arguments = (value, pointer, ir.Constant(I32, 4), mask)
    _intrinsic(b, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), arguments)


def load_weights(
    b: Builder, kind: Kind, address: Value, scale: Value, mask: Value | None = None
) -> Value:
    """16 weights as float32. `scale` (a vector) is used with fp8 only.

    bf16 is the upper half of a float32. e4m3: its exponent and mantissa, moved to the place where
    a float32 has them, are the value times 2^-120, subnormals included (bias 127 against 7); the
    missing factor is in the scale, so scale_inv must be below 2^8. The two NaN codes read as 480.
    """
    if kind is Kind.F32:
        return load_f32(b, address, mask)
    if kind is Kind.BF16:
        half = b.zext(_load_lanes(b, address, I16, "i16", mask), INT_VECTOR)
        return b.bitcast(b.shl(half, fill(I32, 16)), VECTOR)
    code = b.sext(_load_lanes(b, address, I8, "i8", mask), INT_VECTOR)
    bits = b.and_(b.shl(code, fill(I32, 20)), fill(I32, 0x87F00000))
    return b.fmul(b.bitcast(bits, VECTOR), scale)


def load_scale(b: Builder, kind: Kind, scales: Value, column: Value) -> Value:
    """The scale of the 128-column block of `column` as a vector, times 2^120; ZERO if not fp8."""
    if kind is not Kind.FP8:
        return ZERO
    scale = load(b, offset(b, scales, b.lshr(column, const(7)), 4))
    return b.fmul(broadcast(b, scale), fill(F32, 2.0**120))


def reduce_lanes(b: Builder, vectors: Sequence[Value]) -> Value:
    """Up to 16 vectors -> one whose lane i is the sum of the lanes of vectors[i].

    The tree is the same for each: lanes 8 apart, then 4, 2 and 1. Two vectors share one addition
    at every stage, so 16 vectors take 15 additions instead of 64.
    """
    current: list[tuple[Value | None, list[int]]] = [
        (vectors[i] if i < len(vectors) else None, [i] * LANES) for i in range(LANES)
    ]
    width = LANES
    while len(current) > 1:
        half = width // 2
        low = [g + j for g in range(0, LANES, width) for j in range(half)]
        pairs = zip(current[0::2], current[1::2], strict=True)
        current = [_add_halves(b, left, right, low, half) for left, right in pairs]
        width = half
    total, owners = current[0]
    order = [owners.index(i) for i in range(LANES)]
    return b.shuffle_vector(total, UNDEFINED, lanes_of(I32, order))


def maximum_lane(b: Builder, vector: Value) -> Value:
    """The largest lane, a float."""
    return _intrinsic(b, f"llvm.vector.reduce.fmax.v{LANES}f32", F32, (vector,))


def _add_halves(
    b: Builder,
    left: tuple[Value | None, list[int]],
    right: tuple[Value | None, list[int]],
    low: list[int],
    half: int,
) -> tuple[Value | None, list[int]]:
    """One stage for two vectors: lane + lane `half` further on, left's results first."""
    owners = [left[1][i] for i in low] + [right[1][i] for i in low]
    if left[0] is None:
        return None, owners
    other = UNDEFINED if right[0] is None else right[0]
    picks = low + [LANES + i for i in low]
    lower = b.shuffle_vector(left[0], other, lanes_of(I32, picks))
    upper = b.shuffle_vector(left[0], other, lanes_of(I32, [i + half for i in picks]))
    return b.fadd(lower, upper), owners


# Minimax polynomial of (e^r - 1 - r) / r^2 on |r| <= ln(2)/2: Cephes, expf.c.
_EXP_TERMS: Final = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_ROUNDER: Final = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, held in the low bits


def exp(b: Builder, x: Value) -> Value:
    """e^x, error below 2 units in the last place on -87..88; e^-87 below, inf above, NaN stays."""
    x = b.select(b.fcmp_ordered("<", x, fill(F32, -87.0)), fill(F32, -87.0), x)
    shifted = fma(b, x, fill(F32, 1.4426950408889634), fill(F32, _ROUNDER))
    n = b.fsub(shifted, fill(F32, _ROUNDER))  # round(x / ln 2)
    r = fma(b, n, fill(F32, -0.693359375), x)
    r = fma(b, n, fill(F32, 2.12194440e-4), r)
    y = fill(F32, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        y = fma(b, y, r, fill(F32, term))
    y = b.fadd(fma(b, y, b.fmul(r, r), r), fill(F32, 1.0))
    power = b.shl(b.add(b.bitcast(shifted, INT_VECTOR), fill(I32, 127)), fill(I32, 23))
    y = b.fmul(y, b.bitcast(power, VECTOR))  # the shift drops the rounder's own bits
    return b.select(b.fcmp_ordered(">", x, fill(F32, 88.0)), fill(F32, float("inf")), y)


def for_each_vector(b: Builder, count: Value, step: Callable[[Value, Value | None], None]) -> None:
    """step(first element, mask) over `count` elements, 16 at a time, the last ones under a mask."""
    full = b.lshr(count, const(4))
    with cgutils.for_range(b, full) as loop:
        step(b.shl(loop.index, const(4)), None)
    done = b.shl(full, const(4))
    rest = b.sub(count, done)
    with b.if_then(b.icmp_signed(">", rest, const(0)), likely=False):
        step(done, first_lanes(b, rest))


def outlined(b: Builder, name: str, arguments: Sequence[Value], emit: Emitter) -> None:
    """Call `name(arguments)`; its body is emitted once a module, by emit(builder, arguments)."""
    signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, signature, name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        body = ir.IRBuilder(function.append_basic_block("entry"))
        emit(body, function.args)
        body.ret_void()
    b.call(function, arguments)


def choose(
    b: Builder, selector: Value, cases: Mapping[int, Emitter], name: str, arguments: Sequence[Value]
) -> None:
    """switch (selector): each case calls a function of its own with the arguments."""
    end = b.append_basic_block("done")
    switch = b.switch(selector, end)
    for value, emit in cases.items():
        block = b.append_basic_block("case")
        switch.add_case(const(value), block)
        b.position_at_end(block)
        outlined(b, f"{name}_{value}", arguments, emit)
        b.branch(end)
    b.position_at_end(end)
