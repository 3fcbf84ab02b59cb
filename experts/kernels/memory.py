"""What compiled kernels need and Numba lacks: raw addresses, an atomic counter, a parallel region.

Kernels get addresses as int64 and never see Python objects, so a call costs microseconds and the
weights may lie anywhere (thousands of separate views into mapped files).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from experts.kernels.simd import F32, I32, I64, const, load, offset, store

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"


def _reader(element: Any, size: int, result: Any) -> Any:
    @intrinsic
    def read(_context, _address, _index):
        """Element `index` of the array at an address."""

        def codegen(_context, b, _signature, args):
            return load(b, offset(b, args[0], args[1], size), element, size)

        return result(types.int64, types.int64), codegen

    return read


def _writer(size: int, value_type: Any) -> Any:
    @intrinsic
    def write(_context, _address, _index, _value):
        """Set element `index` of the array at an address."""

        def codegen(context, b, _signature, args):
            store(b, args[2], offset(b, args[0], args[1], size), size)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value_type), codegen

    return write


read_f32 = _reader(F32, 4, types.float32)
read_i32 = _reader(I32, 4, types.int32)
read_i64 = _reader(I64, 8, types.int64)
write_f32 = _writer(4, types.float32)
write_i64 = _writer(8, types.int64)


@intrinsic
def take(_context, _counter, _count):
    """Add `count` to the int64 at an address, atomically; returns what it was before."""

    def codegen(_context, b, _signature, args):
        pointer = b.inttoptr(args[0], I64.as_pointer())
        return b.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def keep(_context, array):
    """Use an array: Numba frees one after its last use, and it does not see uses by address."""

    def codegen(context, _b, _signature, _args):
        return context.get_dummy_value()

    return types.void(array), codegen


@intrinsic
def address_of(_context, array):
    """Address of the first element of an array; write keep(array) after the last use of it."""

    def codegen(context, b, signature, args):
        made = context.make_array(signature.args[0])(context, b, args[0])
        return b.ptrtoint(made.data, I64)

    return types.int64(array), codegen


@intrinsic
def run_parallel(_context, _gomp_parallel, _num_threads, _body, _argument):
    """body(argument) in `num_threads` threads at once; returns when all have returned.

    gomp_parallel: address of GOMP_parallel(fn, data, num_threads, flags) of the OpenMP runtime
    that torch has loaded: its threads are shared, no second pool competes for the cores, and it
    may be called from several Python threads at once. With one thread the body is called here.
    """

    def codegen(context, b, _signature, args):
        gomp, num_threads, body, argument = args
        work = ir.FunctionType(ir.VoidType(), [I64])
        region = ir.FunctionType(ir.VoidType(), [work.as_pointer(), I64, I32, I32])
        function = b.inttoptr(body, work.as_pointer())
        with b.if_else(b.icmp_signed("<=", num_threads, const(1))) as (alone, together):
            with alone:
                b.call(function, [argument])
            with together:
                start = b.inttoptr(gomp, region.as_pointer())
                count = b.trunc(num_threads, I32)
                b.call(start, [function, argument, count, ir.Constant(I32, 0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
