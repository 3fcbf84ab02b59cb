"""The experts that tokens are sent to inside the model are those of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from router.gate import GateSpec, route
from router.weights import load_gates
from router.worker import RouterWorker
from tests.attention.harness import Rig, Sequences
from tests.reference import Golden

SAFE_MARGIN = 1e-5
"""Between the last chosen score and the next: below it rounding may choose another expert."""


class RecordingRouter:
    """The real router; remembers what the gate says about each micro-batch."""

    def __init__(self, rig: Rig, router: RouterWorker):
        self.routes: dict[int, tuple[Tensor, Tensor]] = {}
        self._router = router
        self._gates = load_gates(rig.checkpoint)
        self._spec = GateSpec.of(rig.config)

    num_renormalised = 0

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Any:
        self.routes[layer] = route(x, self._gates[layer], self._spec)
        return self._router.begin(layer, x)

    def finish(self, ticket: Any) -> Tensor:
        return self._router.finish(ticket)


@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "kimi-k2", "v3fp8"])
def test_routes_are_those_of_the_reference_where_the_margin_is_safe(
    preset: str, rig: Callable[[str], Rig], reference_golden: Callable[[str], list[Golden]]
) -> None:
    golden = reference_golden(preset)[-1]  # the longest prompt
    model = rig(preset).model()
    recorder = RecordingRouter(rig(preset), rig(preset).pool.router())
    model._moe = recorder
    Sequences(model, [golden.ids]).run(chunk=1000, naive=True)
    safe = golden.token_margin > SAFE_MARGIN
    assert safe.float().mean() > 0.9
    assert recorder.routes.keys() == golden.routes.keys()
    for layer, (ids, weights) in golden.routes.items():
        order = ids.argsort(dim=1)
        ours, our_weights = recorder.routes[layer]
        assert torch.equal(ours[safe], ids.gather(1, order)[safe])
        torch.testing.assert_close(
            our_weights[safe], weights.gather(1, order)[safe], rtol=1e-4, atol=1e-5
        )
