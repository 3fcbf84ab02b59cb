"""Configuration of a whole Shoal application: one frozen, typed tree; unknown keys are refused.

`shoal serve` builds it from flags and, with --config, from YAML; `cluster.app:build_app` takes the
same tree as the `args` of a Serve config file. Neither torch nor Ray is imported here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from attention.config import AttentionConfig
from cluster.autoscaling.settings import AttentionScaling, ExpertScaling
from cluster.field_names import fields_at, suggest
from cluster.limits import Limits
from router.config import RouterConfig

Count = Annotated[int, Field(ge=1, le=4096)]
Device = Literal["auto", "cpu", "cuda"]
"""auto: the GPU that is reserved for the worker if it can be used, else the CPU."""
ComputingTier = Literal["attention", "router", "experts"]
Port = Annotated[int, Field(ge=0, le=65535)]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_COMMANDED = 64
"""Workers that `shoal scale` may ask for in a tier without `scaling`."""
HANDOVER_TIMEOUT_S = 60.0
"""So long a stopping expert worker waits for others to take over what it alone holds."""
GRACEFUL_SHUTDOWN_S = HANDOVER_TIMEOUT_S + 30.0
"""So long a replica that is told to stop may take: then it also answers what is under way."""
GPU_UNIT = 1e-4
"""The least part of a GPU that Ray reserves."""
GRPC_SERVICERS = (
    "cluster.protos.inference_pb2_grpc.add_InferenceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
"""What Serve's gRPC proxies serve, by import path."""
SECRET_VARIABLE = "SHOAL_CLUSTER_SECRET"  # noqa: S105 - the variable's name, not its value
"""Environment variable with the secret that members of a cluster prove to each other, in hex."""
API_KEY_VARIABLE = "SHOAL_API_KEY"
"""Environment variable with an API key: a server accepts it for everything, `shoal` sends it."""


def default_model() -> Path:
    """The model that is served when none is named: part of the package, trained by
    tools/train_default_model.py."""
    return Path(__file__).parent / "models" / "shoal-tiny"


class ConfigError(ValueError):
    """A setting that cannot be used; str() is one line: field, value, what to do."""


class StartFailed(Exception):
    """Ray or a deployment did not come up; str() is one line."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pinned(_Section):
    """A deployment whose replicas may be tied to certain nodes."""

    label_selector: dict[str, str] = {}
    """Ray node labels that a node must have, as in ray_actor_options: {} for any node."""
    max_per_node: Count | None = None
    """Replicas on a node at most. They reserve no CPUs: those without a GPU may all end on one
    node. None: any number."""


class Computing(Pinned):
    """A deployment whose workers may use GPUs."""

    device: Device | None = None
    """None: the application's."""
    num_gpus: Annotated[float, Field(ge=0, le=64)] | None = None
    """GPUs of one worker, 0 for none. Below 1 it shares one with others and may use that part of
    its memory. None: `shoal serve` divides what there is (cluster/gpus.py); elsewhere none."""

    @field_validator("num_gpus")
    @classmethod
    def _can_be_reserved(cls, num_gpus: float | None) -> float | None:
        if num_gpus is not None and num_gpus > 1 and num_gpus != int(num_gpus):
            raise ValueError("Ray reserves a part of one GPU or whole GPUs: at most 1, or 2, 3, ..")
        if num_gpus is not None and 0 < num_gpus < GPU_UNIT:
            raise ValueError(f"Ray divides a GPU into parts of {GPU_UNIT:g}: raise it")
        return num_gpus


class IngressTier(Pinned):
    """The `Ingress` deployment: HTTP and gRPC behind Serve's proxies."""

    num_workers: Count = 1
    """Replicas; a request and its idempotency key are known to one of them."""


class PlacementTier(Pinned):
    """The `Placement` deployment, always one replica."""


class _Tier(Computing):
    """A deployment whose size may change."""

    num_workers: Count
    scaling: AttentionScaling | ExpertScaling | None

    @property
    def max_workers(self) -> int:
        """The most that load or a command can make it."""
        if self.scaling is not None:
            return self.scaling.max_workers
        return max(MAX_COMMANDED, self.num_workers)

    @property
    def follows_load(self) -> bool:
        """Whether a policy decides the size while no command does."""
        return self.scaling is not None and self.scaling.follows_load


class AttentionTier(_Tier):
    """The `Attention` deployment."""

    num_workers: Count = 1
    """At the start; from then on as `scaling` and `shoal scale` say."""
    scaling: AttentionScaling | None = None
    """None: the size changes by command only."""
    num_threads: Count | None = None
    """Compute threads of one worker; None: the machine's cores divided among the workers."""
    engine: AttentionConfig = AttentionConfig()


class RouterTier(Computing):
    """The `Router` deployment, or the same class inside each attention worker.

    A deployment computes its gates on the CPU unless it is given num_gpus. Inside an attention
    worker they are computed where that one computes; device: cpu forbids it.
    """

    mode: Literal["deployment", "inline"] = "deployment"
    num_workers: Count = 1
    """Replicas of the deployment; a second one takes over when the first dies."""
    worker: RouterConfig = RouterConfig()


class Rebalancing(_Section):
    """Moving replicas to where the load is, while requests run."""

    enabled: bool = True
    every_s: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    """Least time between two steps."""
    max_moves: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """Slots loaded in a step at most; None: an eighth of the pool's."""
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Part of the busiest worker's load that a change must take off it."""


class ExpertTier(_Tier):
    """The `Experts` deployment."""

    num_workers: Count = 2
    """At the start; from then on as `scaling` and `shoal scale` say."""
    scaling: ExpertScaling | None = None
    """None: the size changes by command only."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Part of a worker's share of a GPU that its slots may take."""
    num_threads: Count | None = None
    redundancy: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    """Slots of the whole pool that hold second replicas; None: an eighth of the experts."""
    slots_per_worker: Count | None = None
    """(layer, expert) pairs a worker holds; None: what num_workers and redundancy need."""
    spare_slots_per_worker: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    """Slots kept for experts whose last holder died or leaves; None: all the model has on the CPU,
    where a slot is a view of the mapped file, and none on a GPU, where it costs memory."""
    load_window_s: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    """The load is what the experts computed in so many seconds."""
    rebalance: Rebalancing = Rebalancing()
    emulated_pairs_per_s: Annotated[float, Field(gt=0)] | None = None
    """For experiments: a worker sleeps to be as slow as a device that computes so many (token,
    expert) pairs a second."""


class Listen(_Section):
    """Where clients reach the application."""

    host: str = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Port = 9000


class Auth(_Section):
    """API keys of clients; with none, here and in SHOAL_API_KEY, everything is open."""

    keys_file: Path | None = None
    """Lines `name scopes key`, see cluster/frontend/api_keys.py; read again when it changes."""
    insecure: bool = False
    """Let `shoal serve` listen beyond loopback without any key."""


class Observability(_Section):
    """What operators see."""

    metrics: bool = True
    """Numbers of every worker at /metrics, in Ray's own metrics and in /status."""
    traces: bool = False
    """OpenTelemetry spans of requests; the standard OTEL_* variables say where they go."""
    log_format: Literal["text", "json"] = "text"
    """Of the log: one line an event either way."""
    log_prompts: bool = False
    """Have the log tell what clients wrote and what they got."""


class ShoalConfig(_Section):
    """Everything that `shoal serve` can be told."""

    model: Path = Field(default_factory=default_model)
    """Folder of the checkpoint: config.json, safetensors, tokenizer.json; without one, the tiny
    model that ships with Shoal."""
    served_model_name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Name in the API; None: the folder's name."""
    deterministic: bool = False
    """Bit-identical answers whatever the placement, batch or failure; slower."""
    device: Device = "auto"
    """Of all tiers that do not say otherwise. cuda: a worker that finds no GPU does not start."""
    strict_params: bool = False
    """Answer 400 to unknown request fields instead of ignoring them with a header."""
    ingress: IngressTier = IngressTier()
    placement: PlacementTier = PlacementTier()
    attention: AttentionTier = AttentionTier()
    router: RouterTier = RouterTier()
    experts: ExpertTier = ExpertTier()
    listen: Listen = Listen()
    auth: Auth = Auth()
    observability: Observability = Observability()
    limits: Limits = Limits()
    """Of what a client may send or hold."""
    enable_operations: bool | None = None
    """Routes that change the cluster (`shoal experts`, `shoal scale`). None turns them on where
    they need an API key, and where `shoal serve` listens on loopback itself."""
    enable_chaos: bool = False
    """`shoal chaos` may kill and stop workers."""
    channel: Literal["unix", "tcp", "shm", "cuda", "nixl"] = "unix"
    """Data plane. unix, tcp: sockets, on one machine or across. Rows beside the frames: shm through
    memory that processes of a host share, cuda from GPU to GPU of a host, nixl by RDMA."""
    runtime_dir: Path | None = None
    """Folder of the unix sockets; None: a fresh private one under the system's temporary folder."""

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model.resolve().name

    def served_here(self) -> ShoalConfig:
        """With what only who opens the ports can know: whether clients are on this machine."""
        if self.enable_operations is not None or self.listen.host not in LOOPBACK:
            return self
        return self.model_copy(update={"enable_operations": True})

    @property
    def engine(self) -> AttentionConfig:
        """Settings of the attention engine, with the application-wide switches folded in."""
        return self.attention.engine.model_copy(update={"deterministic": self.deterministic})

    @property
    def router_worker(self) -> RouterConfig:
        """Settings of a router, with the application-wide switches folded in."""
        return self.router.worker.model_copy(update={"deterministic": self.deterministic})

    def device_of(self, tier: ComputingTier) -> Device:
        """Where its workers shall compute, as far as it was said."""
        own: Device | None = getattr(self, tier).device
        return own or self.device

    def may_use_gpu(self, tier: ComputingTier) -> bool:
        """Whether a worker may compute on a GPU. Once the GPUs are divided: whether one is reserved
        for it."""
        return self.device_of(tier) != "cpu" and getattr(self, tier).num_gpus != 0

    @model_validator(mode="after")
    def _cuda_has_gpus(self) -> Self:
        tiers: tuple[ComputingTier, ...] = ("attention", "experts")
        lacking = [t for t in tiers if self.device_of(t) == "cuda" and not self.may_use_gpu(t)]
        router = self.router
        if router.mode == "deployment" and router.device == "cuda" and not router.num_gpus:
            lacking.append("router")
        if lacking:
            name = lacking[0]
            raise ValueError(
                f"device cuda for {name}, which reserves no GPU: set {name}.num_gpus to 1 or a "
                f"part of one, or {name}.device to cpu"
            )
        return self

    def threads(self, tier: Literal["attention", "experts"]) -> int:
        """Compute threads of one worker: two that fight for a core run 20x slower than one."""
        asked = getattr(self, tier).num_threads
        if asked:
            return int(asked)
        workers = self.attention.num_workers + self.experts.num_workers
        return max(1, (os.cpu_count() or 1) // workers)


def parse_config(data: dict[str, Any]) -> ShoalConfig:
    """Validate a tree of settings. Raises ConfigError naming the field, the value and the fault."""
    try:
        return ShoalConfig.model_validate(data)
    except ValidationError as error:
        raise config_error(ShoalConfig, error, "config") from None


def config_error(
    model: type[BaseModel], error: ValidationError, whole: str, if_missing: str = "add it"
) -> ConfigError:
    """The first fault that pydantic found. whole: what to call the tree itself."""
    first = error.errors(include_url=False)[0]
    location, given = first["loc"], first["input"]
    field = ".".join(str(part) for part in location) or whole
    if first["type"] == "extra_forbidden":
        known = fields_at(model, location[:-1])
        return ConfigError(f"{field}: unknown setting; {suggest(str(location[-1]), known)}")
    if first["type"] == "missing":
        return ConfigError(f"{field}: missing; {if_missing}")
    why = first["msg"].removeprefix("Value error, ")  # pydantic's mark of our own validators
    shown = "" if isinstance(given, dict) else f" = {given!r}"
    return ConfigError(f"{field}{shown}: {why}")


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file. Raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(data).__name__}")
    return data


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `override` on top; neither is changed."""
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        merged[key] = (
            merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
        )
    return merged
