"""What compiled kernels need and Numba lacks: raw addresses and an atomic counter.

Kernels get addresses as int64 and never see Python objects, so a call costs microseconds and the
weights may lie anywhere (thousands of separate views into mapped files).
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from experts.kernels.simd import F32, I32, I64, load, offset, store

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
write_i32 = _writer(4, types.int32)
write_i64 = _writer(8, types.int64)


@intrinsic
def take(_context, _counter, _count):
    """Add `count` to the int64 at an address, atomically; returns what it was before."""

    def codegen(_context, b, _signature, args):
        pointer = b.inttoptr(args[0], I64.as_pointer())
        return b.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen
