"""Pod templates of the head and of the worker groups.

KubeRay's own probes are left to it. Those of workers ask Serve's proxy, which is on every node that
has a replica; as each tier has replicas, each pod becomes ready.
"""

from __future__ import annotations

from typing import Any, Literal

from cluster.config import SECRET_VARIABLE
from cluster.deploy.config import DeployConfig
from cluster.deploy.hardware import known_gpu
from cluster.deploy.manifests.names import (
    CLIENT_PORT,
    CLUSTER_SECRET_KEY,
    COMPONENT_LABEL,
    DASHBOARD_PORT,
    GCS_PORT,
    METRICS_PORTS,
    Tier,
    cluster_secret,
    labels,
    priority_class,
    selector,
    serving_ports,
    worker_account,
)
from cluster.deploy.manifests.volumes import Volume, api_keys, model, quantity, shared_memory
from cluster.deploy.sections import Monitoring, Pod, Toleration, WorkerGroup
from cluster.deploy.sizing import GIB
from cluster.limits import MAX_GRPC_MESSAGE_BYTES

USER_ID = 1000
"""Of the image's only user."""
GPU_RESOURCE, GPU_PRODUCT_LABEL = "nvidia.com/gpu", "nvidia.com/gpu.product"
HOSTNAME_LABEL = "kubernetes.io/hostname"
HEAD_TERMINATION_S = 60
DRAIN_MARGIN_S = 60
"""Between the end of a node's drain and the end of its pod."""
DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
LAST_LINES = "FallbackToLogsOnError"
"""Why a container ended is then in the pod's status, which outlives its log."""
CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def head_template(config: DeployConfig) -> dict[str, Any]:
    """No replica runs there. Its service account is KubeRay's, with the autoscaler's rights."""
    inner = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "client": CLIENT_PORT}
    ports = inner | serving_ports(config) | METRICS_PORTS
    memory = round(config.head.memory_gib * GIB)
    container = _container(config, "ray-head", ports, [shared_memory()])
    container["resources"] = resources(config, config.head, memory)
    container["env"] += _metrics_pages(config.monitoring)
    spec = _pod(config, config.head, "control", [container], [shared_memory()])
    spec["terminationGracePeriodSeconds"] = HEAD_TERMINATION_S
    return _template(config, "head", spec)


def worker_template(
    config: DeployConfig, tier: Tier, pod: Pod, memory_bytes: int
) -> dict[str, Any]:
    """Pods of a tier; only the ingress reads API keys, the embedded model needs no check."""
    volumes = [shared_memory(), *model(config), *(api_keys(config) if tier == "ingress" else [])]
    ports = serving_ports(config) | {"metrics": METRICS_PORTS["metrics"]}
    container = _container(config, "ray-worker", ports, volumes)
    container["resources"] = resources(config, pod, memory_bytes)
    container["env"].append(_drain_time(config.times.termination_s))
    spec = _pod(config, pod, "serving", [container], volumes)
    spec |= {
        "serviceAccountName": worker_account(config),
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": config.times.termination_s,
        "topologySpreadConstraints": _spread(config, tier, pod),
    }
    if not config.model.is_embedded:
        spec["initContainers"] = [_verify_model(config)]
    if isinstance(pod, WorkerGroup):
        spec |= _near_the_others(config, pod.pack_by)
    return _template(config, tier, spec)


def resources(config: DeployConfig, pod: Pod, memory_bytes: int) -> dict[str, Any]:
    """Requests and limits; a GPU's must be equal."""
    share = config.overcommit
    limits = {"cpu": _cpus(pod.cpus), "memory": quantity(memory_bytes)}
    requests = {"cpu": _cpus(pod.cpus / share), "memory": _mebibytes(memory_bytes / share)}
    gpus = {GPU_RESOURCE: str(pod.gpus_per_pod)} if isinstance(pod, WorkerGroup) and pod.gpu else {}
    return {"requests": requests | gpus, "limits": limits | gpus}


def _cpus(cpus: float) -> str:
    return str(int(cpus)) if cpus == int(cpus) else f"{round(cpus * 1000)}m"


def _mebibytes(size_bytes: float) -> str:
    return quantity(round(size_bytes / 2**20) * 2**20)


def _template(config: DeployConfig, component: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"labels": labels(config, component)}, "spec": spec}


def _container(
    config: DeployConfig, name: str, ports: dict[str, int], volumes: list[Volume]
) -> dict[str, Any]:
    return {
        "name": name,
        "image": config.image,
        "imagePullPolicy": config.image_pull_policy,
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "env": _environment(config),
        "terminationMessagePolicy": LAST_LINES,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [mount for _, mount in volumes],
    }


def _environment(config: DeployConfig) -> list[dict[str, Any]]:
    reference = {"name": cluster_secret(config), "key": CLUSTER_SECRET_KEY}
    plain = {
        "OMP_WAIT_POLICY": "passive",  # workers share the cores: no spinning
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MAX_GRPC_MESSAGE_BYTES),
    }
    if config.log_to_stderr:
        plain["RAY_LOG_TO_STDERR"] = "1"
    return [
        {"name": SECRET_VARIABLE, "valueFrom": {"secretKeyRef": reference}},
        *({"name": name, "value": value} for name, value in plain.items()),
    ]


def _metrics_pages(monitoring: Monitoring) -> list[dict[str, str]]:
    """For Ray's dashboard: whom it asks, and what the browser embeds."""
    browser_url = monitoring.grafana_browser_url or monitoring.grafana_url
    urls = {
        "RAY_PROMETHEUS_HOST": monitoring.prometheus_url,
        "RAY_GRAFANA_HOST": monitoring.grafana_url,
        "RAY_GRAFANA_IFRAME_HOST": browser_url,
    }
    return [{"name": name, "value": url} for name, url in urls.items() if url is not None]


def _pod(
    config: DeployConfig,
    pod: Pod,
    priority: Literal["control", "serving"],
    containers: list[dict[str, Any]],
    volumes: list[Volume],
) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "priorityClassName": priority_class(config, priority),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",  # else minutes of chown in a large model
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
        "volumes": [volume for volume, _ in volumes],
    }
    if config.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in config.image_pull_secrets]
    if chosen := _node_selector(pod):
        spec["nodeSelector"] = chosen
    if tolerations := _tolerations(pod):
        spec["tolerations"] = tolerations
    return spec


def _node_selector(pod: Pod) -> dict[str, str]:
    product = {}
    if isinstance(pod, WorkerGroup) and pod.gpu:
        product = {GPU_PRODUCT_LABEL: known_gpu(pod.gpu).products[0]}
    return product | pod.node_selector


def _tolerations(pod: Pod) -> list[dict[str, Any]]:
    gpu = isinstance(pod, WorkerGroup) and pod.gpu
    ours = (Toleration(key=GPU_RESOURCE, effect="NoSchedule"),) if gpu else ()
    return [
        {
            "operator": "Equal" if t.value is not None else "Exists",
            **t.model_dump(exclude_none=True),
        }
        for t in (*ours, *pod.tolerations)
    ]


def _spread(config: DeployConfig, tier: Tier, pod: Pod) -> list[dict[str, Any]]:
    """Over nodes, and over racks or zones if asked: what falls together should hold little."""
    keys = [HOSTNAME_LABEL]
    if isinstance(pod, WorkerGroup) and pod.spread_by:
        keys.append(pod.spread_by)
    return [
        {
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": selector(labels(config, tier)),
        }
        for key in keys
    ]


def _near_the_others(config: DeployConfig, topology_key: str | None) -> dict[str, Any]:
    """Each layer crosses between attention and experts twice: both in one fast network."""
    if topology_key is None:
        return {}
    computing = {
        "matchLabels": labels(config),
        "matchExpressions": [
            {"key": COMPONENT_LABEL, "operator": "In", "values": ["attention", "experts"]}
        ],
    }
    term = {"labelSelector": computing, "topologyKey": topology_key}
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {
        "affinity": {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
    }


def _drain_time(termination_s: int) -> dict[str, str]:
    """So long `ray start --block`, told to stop, lets Serve move the replicas to other nodes before
    it ends what is left; Ray itself would give them 30 s."""
    return {"name": DRAIN_VARIABLE, "value": str(termination_s - DRAIN_MARGIN_S)}


def _verify_model(config: DeployConfig) -> dict[str, Any]:
    """A checkpoint that is not there, or not whole, ends here with one line."""
    size = {"cpu": "1", "memory": "4Gi"}
    return {
        "name": "verify-model",
        "image": config.image,
        "imagePullPolicy": config.image_pull_policy,
        "command": ["shoal", "model", "verify", config.model.path],
        "terminationMessagePolicy": LAST_LINES,
        "securityContext": CONTAINER_SECURITY,
        "resources": {"requests": size, "limits": size},
        "volumeMounts": [mount for _, mount in model(config)],
    }
