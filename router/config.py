"""Settings of a router."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class RouterConfig(BaseModel):
    """Times, sizes and switches of one router."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deterministic: bool = False
    """One row a (token, expert) pair comes back, summed by expert id: the same bits under every
    placement, batch mix and failure, for up to k times the bytes of the answers."""
    lanes: Annotated[int, Field(ge=1, le=64)] = 2
    """Deployed: micro-batches under way at a time, each with its own connections to the experts."""
    max_batch_rows: Annotated[int, Field(ge=1, le=65536)] = 512
    """Token rows of one exchange with the experts: larger micro-batches are split, waiting smaller
    ones of a layer are merged up to this."""
    max_waiting: Annotated[int, Field(ge=1)] = 1024
    """Deployed: micro-batches that wait for a lane; more are answered OVERLOADED."""
    deadline_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """How long a micro-batch may wait for lost, slow or missing experts before it fails."""
    on_unavailable: Literal["wait", "renormalise"] = "wait"
    """When experts have had no holder for expert_wait_s. wait: go on, up to deadline_s.
    renormalise: answer without them, the weights of each token's others scaled to the same sum."""
    expert_wait_s: Annotated[float, Field(ge=0)] = 5.0
    hop_timeout_s: Annotated[float, Field(gt=0)] = 0.25
    """A worker is given max(this, hop_timeout_factor * moving p99 of hops of that size) to answer
    before its rows go to another holder. On a GPU 0.005 suits."""
    hop_timeout_factor: Annotated[float, Field(ge=1)] = 8.0
    hop_timeout_cold_s: Annotated[float, Field(gt=0)] = 2.0
    """The same for sizes of which too few answers are known: first prefills on a CPU are slow."""
    quarantine_base_s: Annotated[float, Field(gt=0)] = 0.05
    """How long a worker is left alone after a fault; doubles with each further one. One that hangs
    is left alone until it answers a probe."""
    quarantine_max_s: Annotated[float, Field(gt=0)] = 10.0
    stale_table_retry_s: Annotated[float, Field(gt=0)] = 0.2
    """After NOT_HERE without another holder: ask again after this even without a new table."""
    connect_timeout_s: Annotated[float, Field(gt=0)] = 0.25
    """A worker that does not accept for so long counts as one that hangs."""
