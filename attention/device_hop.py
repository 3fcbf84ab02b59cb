"""A step's way to the routed experts and back, seen from a device.

Two kinds of MoE clients: those that take rows where they lie (all experts on this device, or a
channel between devices) and those of the host. For the latter the rows go through pinned memory, in
the dtype of the device. A hop is sent in two steps so that the device has the shared expert to
compute meanwhile: `send` begins it, calling what it returns ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeGuard

from torch import Tensor

from attention.model import wait_limit_s
from experts.staging import Staging
from router.client import MoeClient

Receive = Callable[[], Tensor]
"""Waits for the routed experts' output [T, d] on the device. Raises as MoeClient.finish."""


class Hop(Protocol):
    """How rows get to the experts."""

    def send(self, layer: int, x: Tensor, wait_until_s: float | None) -> Receive:
        """x [T, d] on the device; must not change until the result was received."""


class DirectHop:
    """To a client that takes rows on the device."""

    def __init__(self, moe: MoeClient) -> None:
        self._moe = moe

    def send(self, layer: int, x: Tensor, wait_until_s: float | None) -> Receive:
        ticket = self._moe.begin(layer, x, wait_limit_s(wait_until_s))
        return lambda: self._moe.finish(ticket)


class StagedHop:
    """To a client of the host."""

    def __init__(self, moe: MoeClient, staging: Staging) -> None:
        self._moe = moe
        self._staging = staging

    def send(self, layer: int, x: Tensor, wait_until_s: float | None) -> Receive:
        rows = self._staging.to_host(x)

        def receive() -> Tensor:
            ticket = self._moe.begin(layer, rows.wait(), wait_limit_s(wait_until_s))
            (routed,) = self._staging.to_device(self._moe.finish(ticket))
            return routed

        return receive


def open_hop(moe: MoeClient, staging: Staging) -> Hop:
    """How to reach this client from the device of `staging`."""
    return DirectHop(moe) if getattr(moe, "accepts_device", False) else StagedHop(moe, staging)


class CapturableClient(MoeClient, Protocol):
    """A hop to it never waits, nor leaves the device, so that it may be part of a recorded segment.
    Rows that are not finite are noted there and asked for afterwards."""

    def forget(self) -> None:
        """A step begins: what was noted before does not concern it. Does not wait."""

    def check(self, num_rows: int) -> None:
        """Raises NonFiniteInput for the first of the step's num_rows rows that was noted. Waits for
        the device."""


def is_capturable(moe: MoeClient) -> TypeGuard[CapturableClient]:
    """Whether it is one."""
    return bool(getattr(moe, "accepts_device", False) and getattr(moe, "capturable", False))
