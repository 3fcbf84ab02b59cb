"""The parts of a deployment's configuration: model, tiers, storage, upgrades, options.

What the model dictates (slots, memory, cache) may be left out and is then computed: sizing.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.config import Count

DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Seconds = Annotated[int, Field(ge=1, le=86_400)]
Pods = Annotated[int, Field(ge=1, le=1024)]
Cpus = Annotated[float, Field(gt=0, le=1024)]
Gib = Annotated[float, Field(gt=0, le=1 << 16)]
INCREMENTAL = "NewClusterWithIncrementalUpgrade"
HttpUrl = Annotated[str, Field(pattern=r"^https?://[^\s/:]+(:\d{1,5})?(/\S*)?$", max_length=500)]
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\s]*$")]


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    """What is served, and of what size it is."""

    name: Literal["embedded", "v2-lite", "v2", "v3", "kimi-k2"] | None = None
    """A known architecture; embedded: the tiny model inside the image. None: `config` says."""
    config: dict[str, Any] | None = None
    """The model's own config.json, for one that `name` does not list. In deploy.yaml also the path
    of that file, relative to deploy.yaml."""
    weights: Literal["fp8", "bf16", "float32"] | None = None
    """Type of the weights; None: as the model was published."""
    path: AbsolutePath | None = None
    """Folder of the checkpoint inside the pods, under storage.mount_path."""
    served_name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Name in the API; None: the folder's name."""

    @property
    def is_embedded(self) -> bool:
        return self.name == "embedded"

    @model_validator(mode="after")
    def _is_of_known_size(self) -> Self:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either name or config (the model's config.json)")
        if self.is_embedded == (self.path is not None):
            raise ValueError("give path (folder in the pods) unless name is embedded")
        return self


class Toleration(Section):
    """Of a taint that the nodes of a tier have."""

    key: str
    value: str | None = None
    """None: any."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Pod(Section):
    """What the pods of every tier have."""

    cpus: Cpus
    """CPU limit of a pod."""
    memory_gib: Gib | None = None
    """Memory limit of a pod, shared memory included; None: what its processes need."""
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()


class Head(Pod):
    """Ray's head: GCS, dashboard, autoscaler, Serve's controller. No replica runs there."""

    cpus: Cpus = 4
    memory_gib: Gib = 16
    """Memory limit of the pod, shared memory included."""


class IngressGroup(Pod):
    """CPU pods with the deployments `Ingress` and `Placement`."""

    cpus: Cpus = 4
    pods: Pods = 1
    replicas_per_pod: Count = 1


class WorkerGroup(Pod):
    """Pods of a tier that computes."""

    cpus: Cpus = 8
    pods: Pods = 1
    """At the start, and never fewer."""
    max_pods: Pods | None = None
    """The most that load or a command can make it; None: as at the start."""
    gpu: str | None = None
    """Kind of the nodes' GPUs, as in hardware.GPUS; None: the tier computes on CPUs."""
    gpus_per_pod: Annotated[int, Field(ge=0, le=64)] = 0
    """All of a node's, so that a pod has the node to itself. A worker uses one GPU."""
    workers_per_pod: Count | None = None
    """Workers of a pod on CPUs; None: one. On GPUs there is one a GPU."""
    pack_by: str | None = None
    """Node label of an NVLink domain or rack in which the tier's pods are best kept together."""
    spread_by: str | None = None
    """Node label over whose values (racks, zones) the tier's pods are spread evenly."""

    @property
    def most_pods(self) -> int:
        return self.max_pods or self.pods

    @property
    def workers_of_a_pod(self) -> int:
        return self.gpus_per_pod or self.workers_per_pod or 1

    @property
    def num_workers(self) -> int:
        return self.pods * self.workers_of_a_pod

    @property
    def max_workers(self) -> int:
        return self.most_pods * self.workers_of_a_pod

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.most_pods < self.pods:
            raise ValueError(f"max_pods {self.max_pods} is less than pods {self.pods}: raise it")
        if (self.gpu is None) != (self.gpus_per_pod == 0):
            raise ValueError("give both gpu (its kind) and gpus_per_pod, or neither")
        if self.gpu is not None and self.workers_per_pod is not None:
            raise ValueError("workers_per_pod is for tiers without GPUs: remove it")
        return self


class AttentionGroup(WorkerGroup):
    """Pods with the deployments `Attention` and `Router`."""

    cache_tokens: Annotated[int, Field(ge=16)] | None = None
    """Tokens in the KV cache of a worker; None: what is free beside the weights."""
    routers_per_pod: Count = 1


class ExpertGroup(WorkerGroup):
    """Pods with the deployment `Experts`."""

    redundancy: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    """Slots of the whole pool for second replicas; None: an eighth of the experts, or as many as
    fit."""


class Claim(Section):
    """A PersistentVolumeClaim that all workers read the model from."""

    name: DnsLabel = "shoal-models"
    create: bool = True
    """False: it exists already."""
    size_gib: Annotated[int, Field(ge=1)] | None = None
    """None: the checkpoint and a tenth."""
    storage_class: str | None = None
    """One that can ReadWriteMany; None: the cluster's default."""


class Storage(Section):
    """Where the checkpoint lies. An embedded model needs none."""

    claim: Claim | None = None
    host_path: AbsolutePath | None = None
    """Folder on every node's own disk (NVMe), mounted read-only. The namespace must then be allowed
    hostPath volumes: it is labelled privileged."""
    mount_path: AbsolutePath = "/models"

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.claim and self.host_path:
            raise ValueError("claim and host_path are alternatives: remove one")
        return self


class Upgrade(Section):
    """What happens when more than serveConfigV2 changes."""

    strategy: Literal["None", "NewCluster", "NewClusterWithIncrementalUpgrade"] = "NewCluster"
    """NewCluster: a second cluster beside the first, which takes twice the GPUs. None: changes of
    the cluster are ignored, delete and apply. Incremental needs a Gateway and gives up gRPC, which
    KubeRay 1.7 cannot route then."""
    gateway_class: str | None = None
    step_size_percent: Annotated[int, Field(ge=1, le=100)] = 10
    max_surge_percent: Annotated[int, Field(ge=1, le=100)] = 100
    interval_s: Seconds = 60
    old_cluster_kept_s: Seconds = 300
    """So long streams on the old cluster may still run after the switch."""

    @model_validator(mode="after")
    def _steps_are_possible(self) -> Self:
        if self.strategy == INCREMENTAL and not self.gateway_class:
            raise ValueError("gateway_class is missing: name a GatewayClass of the cluster")
        if self.step_size_percent > self.max_surge_percent:
            raise ValueError("step_size_percent exceeds max_surge_percent: lower it")
        return self


class Auth(Section):
    """Who may talk to whom. The Secrets are made by `shoal k8s apply`, or by hand."""

    api_keys: bool = True
    """Clients need a key of the Secret NAME-api-keys, which is mounted as a file."""


class Times(Section):
    """How long a slow thing may take."""

    initializing_s: Annotated[int, Field(ge=60, le=86_400)] = 7200
    """From apply to the first answer; then KubeRay gives up for good, and only a new RayService
    helps."""
    idle_pod_s: Annotated[int, Field(ge=60, le=86_400)] = 600
    """A pod without replicas is kept so long: its successor would load weights for minutes."""
    termination_s: Annotated[int, Field(ge=180, le=86_400)] = 300
    """A pod that is told to go may take so long; a drained worker takes up to 90 s."""


class AlertLimits(Section):
    """What is too slow: a start, or the slowest hundredth over ten minutes; of the latter less than
    the histograms can tell."""

    start_s: Annotated[int, Field(ge=60, le=86_400)] = 900
    """So long a worker may take until it is ready: its pod, its image, its weights."""
    first_token_s: Annotated[float, Field(gt=0, lt=2560)] = 10.0
    token_gap_s: Annotated[float, Field(gt=0, lt=80)] = 0.5
    """Between two tokens of a stream."""
    hop_s: Annotated[float, Field(gt=0, lt=10)] = 0.1
    """From a router to an expert worker and back."""


class Monitoring(Section):
    """For the Prometheus operator, and for Grafana."""

    enabled: bool = False
    namespace: DnsLabel = "monitoring"
    """Where Prometheus and Grafana run."""
    labels: dict[str, str] = {"release": "prometheus"}
    """By which Prometheus selects its PodMonitors and PrometheusRules."""
    dashboard_labels: dict[str, str] = {"grafana_dashboard": "1"}
    """By which Grafana's sidecar selects ConfigMaps with dashboards."""
    alerts: AlertLimits = AlertLimits()
    prometheus_url: HttpUrl | None = None
    """Where Ray's dashboard asks, http://prometheus.monitoring:9090; None: it shows no metrics."""
    grafana_url: HttpUrl | None = None
    """Where Ray's dashboard finds Grafana."""
    grafana_browser_url: HttpUrl | None = None
    """The same for the browser, which loads panels from there; None: as grafana_url."""


class NetworkRules(Section):
    """Who may open connections to the pods. Needs a network plugin that enforces policies."""

    enabled: bool = False
    operator_namespace: DnsLabel = "kuberay-system"
    client_namespaces: tuple[DnsLabel, ...] = ()
    """Whose pods may call HTTP and gRPC besides those of this namespace and the gateway's."""


class Gateway(Section):
    """Routes of the Gateway API to HTTP and gRPC."""

    enabled: bool = False
    name: DnsLabel = "shoal"
    namespace: DnsLabel = "gateway-system"
    hostname: str = "shoal.example.com"
    grpc_hostname: str = "grpc.shoal.example.com"
    """One of its own: a listener takes a hostname for HTTP or for gRPC."""

    @model_validator(mode="after")
    def _hostnames_differ(self) -> Self:
        if self.hostname == self.grpc_hostname:
            raise ValueError("hostname and grpc_hostname are the same: give gRPC one of its own")
        return self


class GcsRedis(Section):
    """A Redis that outlives the head, so that workers survive its restart."""

    enabled: bool = False
    image: str = "redis:8.2-alpine"
    size_gib: Annotated[int, Field(ge=1)] = 4
    storage_class: str | None = None
