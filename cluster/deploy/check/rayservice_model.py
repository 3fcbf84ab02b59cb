"""The fields of KubeRay 1.7's RayService and RayCluster, as far as Shoal's users may set them.

Types are strict, as on the server: "2" is no integer. `Part` stands for what Kubernetes itself
defines; PARTS says by which definition, and schemas.py checks it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Part = dict[str, Any]
PartList = list[Any]
Texts = dict[str, str]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
ManagedBy = Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]

CLUSTER_PARTS = {
    "autoscalerOptions.env[]": "api.core.v1.EnvVar",
    "autoscalerOptions.envFrom[]": "api.core.v1.EnvFromSource",
    "autoscalerOptions.resources": "api.core.v1.ResourceRequirements",
    "autoscalerOptions.securityContext": "api.core.v1.SecurityContext",
    "autoscalerOptions.volumeMounts[]": "api.core.v1.VolumeMount",
    "gcsFaultToleranceOptions.redisPassword.valueFrom": "api.core.v1.EnvVarSource",
    "gcsFaultToleranceOptions.redisUsername.valueFrom": "api.core.v1.EnvVarSource",
    "headGroupSpec.headService": "api.core.v1.Service",
    "headGroupSpec.template": "api.core.v1.PodTemplateSpec",
    "workerGroupSpecs[].template": "api.core.v1.PodTemplateSpec",
}
"""Places of a RayClusterSpec that Kubernetes defines, with the definition below `io.k8s.`."""
PARTS = {
    "RayService": {
        "metadata": "apimachinery.pkg.apis.meta.v1.ObjectMeta",
        "spec.serveService": "api.core.v1.Service",
        **{f"spec.rayClusterConfig.{path}": name for path, name in CLUSTER_PARTS.items()},
    },
    "RayCluster": {
        "metadata": "apimachinery.pkg.apis.meta.v1.ObjectMeta",
        **{f"spec.{path}": name for path, name in CLUSTER_PARTS.items()},
    },
}


class Model(BaseModel):
    """Field names are the manifest's, in camel case."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=to_camel)


class AuthOptions(Model):
    mode: Literal["disabled", "token"] | None = None
    secret_name: str | None = None
    enable_k8s_token_auth: bool | None = Field(None, alias="enableK8sTokenAuth")


class AutoscalerOptions(Model):
    version: Literal["v1", "v2"] | None = None
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] | None = None
    idle_timeout_seconds: Count | None = None
    image: str | None = None
    image_pull_policy: str | None = None
    args: list[str] | None = None
    command: list[str] | None = None
    env: PartList | None = None
    env_from: PartList | None = None
    resources: Part | None = None
    security_context: Part | None = None
    volume_mounts: PartList | None = None


class Credential(Model):
    value: str | None = None
    value_from: Part | None = None


class GcsStorage(Model):
    access_modes: list[str] | None = None
    claim_name: str | None = None
    deletion_policy: Literal["DeleteWithCluster", "Retain"] | None = None
    size: str | int | None = None
    storage_class_name: str | None = None
    sub_path: str | None = None


class GcsFaultToleranceOptions(Model):
    backend: Literal["redis", "rocksdb"] | None = None
    redis_address: str | None = None
    redis_username: Credential | None = None
    redis_password: Credential | None = None
    external_storage_namespace: str | None = None
    storage: GcsStorage | None = None


class Group(Model):
    ray_start_params: Texts | None = None
    resources: Texts | None = None
    labels: Texts | None = None
    template: Part


class HeadGroup(Group):
    enable_ingress: bool | None = None
    head_service: Part | None = None
    service_type: str | None = None


class ScaleStrategy(Model):
    workers_to_delete: list[str] | None = None


class WorkerGroup(Group):
    group_name: str
    replicas: Count | None = None
    min_replicas: Count | None = None
    max_replicas: Count | None = None
    num_of_hosts: Count | None = None
    idle_timeout_seconds: int | None = None
    priority: int | None = None
    scale_strategy: ScaleStrategy | None = None
    suspend: bool | None = None


class TlsOptions(Model):
    enabled: bool | None = None


class ClusterUpgradeStrategy(Model):
    type: Literal["Recreate", "None"] | None = None


class ClusterSpec(Model):
    ray_version: str | None = None
    enable_in_tree_autoscaling: bool | None = None
    autoscaler_options: AutoscalerOptions | None = None
    auth_options: AuthOptions | None = None
    gcs_fault_tolerance_options: GcsFaultToleranceOptions | None = None
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup] | None = None
    head_service_annotations: Texts | None = None
    managed_by: ManagedBy | None = None
    suspend: bool | None = None
    tls_options: TlsOptions | None = None
    upgrade_strategy: ClusterUpgradeStrategy | None = None


class ClusterUpgradeOptions(Model):
    gateway_class_name: str
    interval_seconds: int
    step_size_percent: int
    max_surge_percent: int | None = None


class UpgradeStrategy(Model):
    type: Literal["None", "NewCluster", "NewClusterWithIncrementalUpgrade"] | None = None
    cluster_upgrade_options: ClusterUpgradeOptions | None = None


class ServiceSpec(Model):
    ray_cluster_config: ClusterSpec
    serve_config_v2: str | None = Field(None, alias="serveConfigV2")
    serve_service: Part | None = None
    upgrade_strategy: UpgradeStrategy | None = None
    exclude_head_pod_from_serve_svc: bool | None = None
    ray_cluster_deletion_delay_seconds: Count | None = None
    managed_by: ManagedBy | None = None
    suspend: bool | None = None
    service_unhealthy_second_threshold: int | None = None
    deployment_unhealthy_second_threshold: int | None = None


class RayService(Model):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Part
    spec: ServiceSpec
    status: Part | None = None


class RayCluster(Model):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Part
    spec: ClusterSpec
    status: Part | None = None


MODELS: dict[str, type[Model]] = {"RayService": RayService, "RayCluster": RayCluster}
