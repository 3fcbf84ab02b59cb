"""What a MoE layer may fail with. `str()` is one line; the fields are for tables and tests."""

from collections.abc import Sequence


class RouterError(Exception):
    """Base: the micro-batch got no result. Nothing else is affected, resending is safe."""


class Unavailable(RouterError):
    """What it needs stayed away until its deadline: later it may go well."""


class NonFiniteInput(RouterError):
    """A token row whose router logits are NaN or infinite: an expert could only return the same."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row

    def __str__(self) -> str:
        return f"row {self.row} of the micro-batch is not finite"


class _LayerError(RouterError):
    """A fault of some experts of one layer, after waiting `waited_s` seconds."""

    reason = "failed"

    def __init__(
        self, layer: int, experts: Sequence[int], waited_s: float, detail: str = ""
    ) -> None:
        super().__init__(layer, tuple(experts), waited_s, detail)
        self.layer = layer
        self.experts = tuple(experts)
        self.waited_s = waited_s
        self.detail = detail

    def __str__(self) -> str:
        experts = ", ".join(str(e) for e in self.experts[:8])
        more = f" and {len(self.experts) - 8} more" if len(self.experts) > 8 else ""
        detail = f": {self.detail}" if self.detail else ""
        return (
            f"layer {self.layer}, experts {experts}{more}: {self.reason}"
            f" after {self.waited_s:.1f} s{detail}"
        )


class ExpertsUnavailable(_LayerError, Unavailable):
    """No live worker holds these experts, or none of them answered before the deadline."""

    reason = "no answer from any worker that holds them"


class ExpertsFailed(_LayerError):
    """Every worker that holds these experts failed on the same rows: the input or the weights."""

    reason = "every worker that holds them failed"


class RouterUnavailable(Unavailable):
    """No router answered before the deadline."""

    def __init__(self, layer: int, waited_s: float, detail: str = "") -> None:
        super().__init__(layer, waited_s, detail)
        self.layer = layer
        self.waited_s = waited_s
        self.detail = detail

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"layer {self.layer}: no router answered within {self.waited_s:.1f} s{detail}"


class RemoteRouterError(RouterError):
    """A router answered that it could not: the name of the frame's status, and its text."""

    def __init__(self, layer: int, status: str, text: str) -> None:
        super().__init__(layer, status, text)
        self.layer = layer
        self.status = status
        self.text = text

    def __str__(self) -> str:
        return f"layer {self.layer}: router answered {self.status}: {self.text}"


class RemoteUnavailable(RemoteRouterError, Unavailable):
    """A router answered that it waited in vain for experts."""
