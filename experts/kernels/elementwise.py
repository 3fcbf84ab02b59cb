"""Elementwise steps between products, over float32 arrays given by address and length."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from experts.kernels import simd
from experts.kernels.simd import F32, Builder, Value, offset

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"


@intrinsic
def gate(_context, _gates, _ups, _length):
    """gates[i] = silu(gates[i]) * ups[i], with silu(g) = g / (1 + e^-g)."""

    def codegen(context, b, _signature, args):
        simd.outlined(b, "shoal_gate", args, _emit_gate)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def _emit_gate(b: Builder, args: Any) -> None:
    gates, ups, length = args

    def step(i: Value, mask: Value | None) -> None:
        address = offset(b, gates, i, 4)
        g = simd.load_f32(b, address, mask)
        up = simd.load_f32(b, offset(b, ups, i, 4), mask)
        below = b.fadd(simd.exp(b, b.fsub(simd.fill(F32, -0.0), g)), simd.fill(F32, 1.0))
        simd.store_f32(b, b.fmul(b.fdiv(g, below), up), address, mask)

    simd.for_each_vector(b, length, step)


@intrinsic
def scale(_context, _target, _length, _factor):
    """target[i] *= factor"""

    def codegen(context, b, _signature, args):
        simd.outlined(b, "shoal_scale", args, _emit_scale)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


def _emit_scale(b: Builder, args: Any) -> None:
    target, length, scalar = args
    factor = simd.broadcast(b, scalar)

    def step(i: Value, mask: Value | None) -> None:
        address = offset(b, target, i, 4)
        simd.store_f32(b, b.fmul(simd.load_f32(b, address, mask), factor), address, mask)

    simd.for_each_vector(b, length, step)


@intrinsic
def clear(_context, _target, _length):
    """target[i] = 0"""

    def codegen(context, b, _signature, args):
        simd.outlined(b, "shoal_clear", args, _emit_clear)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), codegen


def _emit_clear(b: Builder, args: Any) -> None:
    target, length = args

    def step(i: Value, mask: Value | None) -> None:
        simd.store_f32(b, simd.ZERO, offset(b, target, i, 4), mask)

    simd.for_each_vector(b, length, step)


@intrinsic
def copy(_context, _target, _source, _length):
    """target[i] = source[i]"""

    def codegen(context, b, _signature, args):
        simd.outlined(b, "shoal_copy", args, _emit_copy)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def _emit_copy(b: Builder, args: Any) -> None:
    target, source, length = args

    def step(i: Value, mask: Value | None) -> None:
        value = simd.load_f32(b, offset(b, source, i, 4), mask)
        simd.store_f32(b, value, offset(b, target, i, 4), mask)

    simd.for_each_vector(b, length, step)


@intrinsic
def add(_context, _target, _source, _length):
    """target[i] += source[i]"""

    def codegen(context, b, _signature, args):
        simd.outlined(b, "shoal_add", args, _emit_add)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def _emit_add(b: Builder, args: Any) -> None:
    target, source, length = args

    def step(i: Value, mask: Value | None) -> None:
        address = offset(b, target, i, 4)
        other = simd.load_f32(b, offset(b, source, i, 4), mask)
        simd.store_f32(b, b.fadd(simd.load_f32(b, address, mask), other), address, mask)

    simd.for_each_vector(b, length, step)
