"""Control messages between the workers and the directory: JSON bodies of CONTROL frames.

    worker    -> directory   Register (first), Holding (after a load), Ping, LoadReport (expert
                             workers) and MetricsReport (both about once a second while they
                             change), LoadRequest, MetricsRequest, Leave
    directory -> worker      Assign (expert workers only), Snapshot (at every change), Pong,
                             ClusterLoadReply and MetricsReply (to each request, with its id),
                             Released (to an expert worker's Leave, in time), Signal
    any member -> directory  a Command: Drain, Replicate, Rebalance, Scale, Chaos; answered with its
                             request id by Done, or by status FAILED and one line that says why

What arrives is checked in full (types, bounds, no unknown field) before anything reads it.
An expert is named by (layer, expert id), never by a slot: a stale table can then miss an expert
but never mean a wrong one.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from experts.channel.frame import Frame, Kind
from experts.metrics import Sample

MAX_EXPERTS_PER_MESSAGE = 1 << 18  # Kimi-K2 has 23,040 (60 layers of 384)
MAX_WORKERS = 4096
MAX_SAMPLES = 512  # of one member

Role = Literal["attention", "router", "experts", "ingress"]
Tier = Literal["experts", "attention"]  # what can be scaled
ChaosAction = Literal["kill", "stop"]
ChaosRole = Literal["experts", "router", "attention"]
WorkerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/#@-]{0,127}$")]
Endpoint = Annotated[str, Field(max_length=256)]
NodeName = Annotated[str, Field(max_length=256)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
LayerId = Annotated[int, Field(ge=0, lt=1 << 16)]
ExpertId = Annotated[int, Field(ge=0, lt=1 << 16)]
ExpertKey = tuple[LayerId, ExpertId]
ExpertKeys = Annotated[tuple[ExpertKey, ...], Field(max_length=MAX_EXPERTS_PER_MESSAGE)]
HoldersOfExpert = Annotated[tuple[WorkerId, ...], Field(max_length=MAX_WORKERS)]
PackedRows = Annotated[bytes, Field(max_length=8 * MAX_EXPERTS_PER_MESSAGE)]
SumOfRows = Annotated[tuple[Count, ...], Field(max_length=1 << 16)]
SumsOfRows = Annotated[tuple[SumOfRows, ...], Field(max_length=1 << 16)]
Samples = Annotated[tuple[Sample, ...], Field(max_length=MAX_SAMPLES)]
WindowS = Annotated[float, Field(gt=0, le=86_400.0, allow_inf_nan=False)]
NumWorkers = Annotated[int, Field(ge=1, le=MAX_WORKERS)]
Targets = dict[Role, Count]  # workers wanted of a role
StopS = Annotated[float, Field(gt=0, le=3600.0, allow_inf_nan=False)]
HoldersOfLayer = Annotated[tuple[HoldersOfExpert, ...], Field(max_length=1 << 16)]


class MessageError(ValueError):
    """A control frame that is not a valid message; str() is one line naming the first fault."""


class CommandRefused(ValueError):
    """A command that the directory did not carry out; str() is one line: what, why, what to do."""


class _Message(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )


class WorkerInfo(_Message):
    """One live worker, as everyone else sees it."""

    worker_id: WorkerId
    role: Role
    endpoint: Endpoint  # where its data plane listens; "" = it only connects out
    pid: Count
    node: NodeName
    num_slots: Count = 0  # expert workers: how many (layer, expert) pairs fit
    spare_slots: Count = 0  # further ones, only for experts that would have no holder otherwise


class Register(WorkerInfo):
    """First message of a connection: this worker is a member for as long as the connection lives.

    `seen_epoch` and `seen_version` are the newest that it was told: a restarted directory goes on
    above them. `seen_scale` is the newest `Snapshot.scale`: it goes on with that of the newest
    version. `drained`: the newest snapshot names this worker among the drained.
    """

    type: Literal["register"] = "register"
    holds: ExpertKeys = ()
    seen_epoch: Count = 0
    seen_version: Count = 0
    seen_scale: Targets = {}
    drained: bool = False

    @property
    def info(self) -> WorkerInfo:
        """What others may know of this worker."""
        return WorkerInfo(**self.model_dump(include=set(WorkerInfo.model_fields)))


class Assign(_Message):
    """The full set of experts that the worker shall hold: load the missing, drop the others."""

    type: Literal["assign"] = "assign"
    epoch: Count  # grows with every Assign to anybody
    experts: ExpertKeys


class Holding(_Message):
    """The full set of experts that the worker can compute now; several may follow one Assign."""

    type: Literal["holding"] = "holding"
    epoch: Count  # of the Assign that it follows
    experts: ExpertKeys


class Snapshot(_Message):
    """The whole cluster at one moment.

    `version` grows at every change, `epoch` only when a holder changes.
    `holders[str(layer)][expert]` are the ids of the workers that hold the expert, sorted; () while
    nobody does. `scale`: numbers of workers set by command; an absent role scales by its policy.
    `drained`: expert workers that are no capacity: they hand over or hold nothing, by command.
    """

    type: Literal["snapshot"] = "snapshot"
    version: Count
    epoch: Count
    ready: bool
    stage: Annotated[str, Field(max_length=512)]  # for people: "loading experts 96/448"
    workers: Annotated[tuple[WorkerInfo, ...], Field(max_length=MAX_WORKERS)] = ()
    holders: Annotated[dict[str, HoldersOfLayer], Field(max_length=1 << 16)] = {}
    scale: Targets = {}
    drained: Annotated[tuple[WorkerId, ...], Field(max_length=MAX_WORKERS)] = ()

    def workers_of(self, role: Role) -> tuple[WorkerInfo, ...]:
        """Live workers of one role, sorted by id."""
        return tuple(worker for worker in self.workers if worker.role == role)

    def holders_of(self, layer: int) -> tuple[tuple[str, ...], ...]:
        """Holders of every expert of a layer, by expert id; () for a layer without experts."""
        return self.holders.get(str(layer), ())


class Ping(_Message):
    """Sign of life from a worker, about once a second; answered by a Pong."""

    type: Literal["ping"] = "ping"


class Pong(_Message):
    """Sign of life from the directory."""

    type: Literal["pong"] = "pong"


class LoadReport(_Message):
    """Rows that an expert worker computed within its window, and in its newest part, `recent`.

    Of one worker the newest report counts. Rows [L, E]: by position of the layer among the model's
    MoE layers and by expert id; 8 bytes a number (`experts.load.pack`), for a hundred workers each
    tell 30,000 of them a second. V3: 58 x 256, 0.3 MB.
    """

    type: Literal["load_report"] = "load_report"
    window_s: WindowS
    rows: PackedRows
    recent_s: WindowS
    recent_rows: PackedRows


class LoadRequest(_Message):
    """Any member asks what all expert workers computed; answered by a ClusterLoadReply."""

    type: Literal["load_request"] = "load_request"


class WorkerRows(_Message):
    """Rows of one expert worker by layer [L]."""

    worker_id: WorkerId
    rows: SumOfRows
    recent_rows: SumOfRows


class ClusterLoadReply(_Message):
    """The newest reports of the live expert workers, added up.

    Rows [L][E] and each worker's rows [L] go by position in `layers`; a worker that has not
    reported yet has zeros. `epoch` is that of the published holders.
    """

    type: Literal["cluster_load"] = "cluster_load"
    epoch: Count
    window_s: WindowS
    recent_s: WindowS
    layers: Annotated[tuple[LayerId, ...], Field(max_length=1 << 16)]
    rows: SumsOfRows
    recent_rows: SumsOfRows
    workers: Annotated[tuple[WorkerRows, ...], Field(max_length=MAX_WORKERS)]


class MetricsReport(_Message):
    """What a member tells of itself in numbers; of one member the newest report counts."""

    type: Literal["metrics_report"] = "metrics_report"
    samples: Samples


class MetricsRequest(_Message):
    """Any member asks for the numbers of all; answered by a MetricsReply."""

    type: Literal["metrics_request"] = "metrics_request"


class WorkerSamples(_Message):
    """The newest of one live member, or of the directory itself; () before its first report."""

    worker_id: WorkerId
    role: Role | Literal["placement"]
    samples: Samples


class MetricsReply(_Message):
    """The directory's own samples, then those of the members by id; and what members that are gone
    had counted, without labels."""

    type: Literal["metrics"] = "metrics"
    workers: Annotated[tuple[WorkerSamples, ...], Field(max_length=MAX_WORKERS + 1)]
    gone: Samples = ()


class Leave(_Message):
    """A worker wants to stop: others shall take over the experts that it alone holds.

    One of another role closes its connection at once: it has left and not died.
    """

    type: Literal["leave"] = "leave"


class Released(_Message):
    """Nobody needs the worker any more: answers its Leave."""

    type: Literal["released"] = "released"


class Drain(_Message):
    """Hand over all experts of a worker; it stays a member without experts.

    It is used again when the others cannot hold every expert, or as a new process.
    """

    type: Literal["drain"] = "drain"
    worker_id: WorkerId


class Replicate(_Message):
    """At least so many holders of an expert (of its whole group) from now on; 1: as before."""

    type: Literal["replicate"] = "replicate"
    layer: LayerId
    expert: ExpertId
    replicas: NumWorkers


class Rebalance(_Message):
    """One placement step now."""

    type: Literal["rebalance"] = "rebalance"


class Scale(_Message):
    """How many workers the tier shall have; None: as its policy says."""

    type: Literal["scale"] = "scale"
    role: Tier
    workers: NumWorkers | None


class Chaos(_Message):
    """Kill a worker, or stop it for a time; None: any one of the role."""

    type: Literal["chaos"] = "chaos"
    action: ChaosAction
    role: ChaosRole
    worker_id: WorkerId | None
    duration_s: StopS


class Done(_Message):
    """A command was carried out, or begun; `text` is one line for people."""

    type: Literal["done"] = "done"
    text: Annotated[str, Field(max_length=1024)]


class Signal(_Message):
    """Chaos for the worker that gets it: kill yourself, or stop for `duration_s`."""

    type: Literal["signal"] = "signal"
    action: ChaosAction
    duration_s: StopS


Command = Drain | Replicate | Rebalance | Scale | Chaos
Message = (
    Register
    | Assign
    | Holding
    | Snapshot
    | Ping
    | Pong
    | LoadReport
    | LoadRequest
    | ClusterLoadReply
    | MetricsReport
    | MetricsRequest
    | MetricsReply
    | Leave
    | Released
    | Command
    | Done
    | Signal
)
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def encode(message: BaseModel, request_id: int = 0) -> Frame:
    """CONTROL frame with the message as its JSON body."""
    body = message.model_dump_json().encode()
    return Frame(kind=Kind.CONTROL, request_id=request_id, body=body)


def decode(frame: Frame) -> Message:
    """The message of a CONTROL frame. Raises MessageError."""
    if frame.kind != Kind.CONTROL:
        raise MessageError(f"control message: frame is of kind {frame.kind.name}, expected CONTROL")
    try:
        return _ADAPTER.validate_json(frame.body, strict=True)
    except ValidationError as error:
        raise MessageError(_one_line(error)) from None


def _one_line(error: ValidationError) -> str:
    """First complaint with its place; values are left out, they may be long or hostile."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part)[:40] for part in first["loc"]) or "body"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"control message: {place}: {first['msg'].splitlines()[0][:200]}{more}"
