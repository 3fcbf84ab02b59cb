"""Threads that help whoever runs a kernel, and that nobody has to wait for.

A job is a function that takes blocks of work from a counter until none is left. The caller opens
the job, works itself, closes it and waits only for helpers that are inside at that moment. A helper
that the operating system has not put on a core in time is not missed. That is the difference to an
OpenMP region, which ends with a barrier for all its threads: with another process on the same two
cores such a region of 40 us took 15-20 ms here. Helpers that find nothing to do give their core
away (sched_yield) for about 50 us and then sleep.

One pool a process. A second Python thread that calls a kernel meanwhile finds the pool taken and
works alone, so that a process never has more runnable threads than it was given.

The pool's state is an int64 array, see the fields below; entry points of libc are in it too.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

from experts.kernels.memory import read_i64, write_i64
from experts.kernels.simd import I64, offset

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

# The fields that threads change stand 64 bytes apart, on cache lines of their own.
TAKEN: Final = 0  # 1 while a caller has the pool
GENERATION: Final = 8  # counts jobs
OPEN: Final = 16  # 1 while helpers may enter
INSIDE: Final = 24  # helpers that may be running the job
SLEEPERS: Final = 32
STOP: Final = 40
BODY: Final = 48  # the job: body(argument)
ARGUMENT: Final = 49
NUM_THREADS: Final = 50  # caller included
SCHED_YIELD: Final = 51  # addresses of libc functions
MUTEX_LOCK: Final = 52
MUTEX_UNLOCK: Final = 53
COND_WAIT: Final = 54
COND_BROADCAST: Final = 55
ALLOCATE: Final = 56
FREE: Final = 57
BODIES: Final = 58  # entry points of jobs.py
MUTEX: Final = 64  # pthread_mutex_t
CONDITION: Final = 80  # pthread_cond_t
FIELDS: Final = 96

_YIELDS_BEFORE_SLEEP: Final = 128


def _atomic(operation: str) -> Any:
    @intrinsic
    def atomic(_context, _pool, _field, _value):
        def codegen(_context, b, _signature, args):
            pointer = b.inttoptr(offset(b, args[0], args[1], 8), I64.as_pointer())
            return b.atomic_rmw(operation, pointer, args[2], "seq_cst")

        return types.int64(types.int64, types.int64, types.int64), codegen

    return atomic


_exchange = _atomic("xchg")
_add = _atomic("add")


@intrinsic
def _look(_context, _pool, _field):
    def codegen(_context, b, _signature, args):
        pointer = b.inttoptr(offset(b, args[0], args[1], 8), I64.as_pointer())
        return b.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _call_body(_context, _body, _argument):
    def codegen(context, b, _signature, args):
        work = ir.FunctionType(ir.VoidType(), [I64])
        b.call(b.inttoptr(args[0], work.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _call_libc(_context, _function, _first, _second):
    """function(first, second); one of fewer arguments ignores the rest, an int is widened."""

    def codegen(_context, b, _signature, args):
        function = ir.FunctionType(I64, [I64, I64])
        return b.call(b.inttoptr(args[0], function.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64), codegen


@njit(inline="always")
def allocate(pool, num_bytes):
    """Address of memory, aligned to 64 bytes."""
    return _call_libc(read_i64(pool, ALLOCATE), 64, (num_bytes + 63) // 64 * 64)


@njit(inline="always")
def release(pool, address):
    """Give back what `allocate` gave."""
    _call_libc(read_i64(pool, FREE), address, 0)


@njit(inline="always")
def _yield(pool):
    _call_libc(read_i64(pool, SCHED_YIELD), 0, 0)


@njit(inline="always")
def _lock(pool):
    _call_libc(read_i64(pool, MUTEX_LOCK), pool + 8 * MUTEX, 0)


@njit(inline="always")
def _unlock(pool):
    _call_libc(read_i64(pool, MUTEX_UNLOCK), pool + 8 * MUTEX, 0)


@njit
def run_with_helpers(pool, num_threads, body, argument):
    """body(argument) here and in those helpers that come; returns when all of them have left.

    num_threads 1: here alone.
    """
    if num_threads <= 1 or _exchange(pool, TAKEN, 1) != 0:
        _call_body(body, argument)
        return
    write_i64(pool, BODY, body)
    write_i64(pool, ARGUMENT, argument)
    _exchange(pool, OPEN, 1)
    _add(pool, GENERATION, 1)
    if _look(pool, SLEEPERS) > 0:
        _lock(pool)
        _call_libc(read_i64(pool, COND_BROADCAST), pool + 8 * CONDITION, 0)
        _unlock(pool)
    _call_body(body, argument)
    _exchange(pool, OPEN, 0)
    while _look(pool, INSIDE) > 0:
        _yield(pool)
    _exchange(pool, TAKEN, 0)


@njit(inline="always")
def _await_job(pool, seen):
    """Until the generation is another one than `seen`, or the pool stops."""
    for _ in range(_YIELDS_BEFORE_SLEEP):
        if _look(pool, GENERATION) != seen:
            return
        _yield(pool)
    _lock(pool)
    _add(pool, SLEEPERS, 1)
    while _look(pool, GENERATION) == seen and _look(pool, STOP) == 0:
        _call_libc(read_i64(pool, COND_WAIT), pool + 8 * CONDITION, pool + 8 * MUTEX)
    _add(pool, SLEEPERS, -1)
    _unlock(pool)


@cfunc(types.void(types.int64), cache=True)
def help_until_stopped(pool):
    """What a helper thread runs.

    It announces itself before it looks whether the job is open, the caller closes the job before
    it looks who is inside (sequentially consistent): so nobody enters unseen.
    """
    seen = -1
    while _look(pool, STOP) == 0:
        _await_job(pool, seen)
        seen = _look(pool, GENERATION)
        _add(pool, INSIDE, 1)
        if _look(pool, OPEN) == 1:
            _call_body(read_i64(pool, BODY), read_i64(pool, ARGUMENT))
        _add(pool, INSIDE, -1)


@cfunc(types.void(types.int64), cache=True)
def stop_helpers(pool):
    """Let the helpers return; they finish the job that they are in."""
    _exchange(pool, STOP, 1)
    _lock(pool)
    _add(pool, GENERATION, 1)
    _call_libc(read_i64(pool, COND_BROADCAST), pool + 8 * CONDITION, 0)
    _unlock(pool)
