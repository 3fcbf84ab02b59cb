"""What a deployment on Kubernetes can be told: `deploy.yaml` as one frozen, typed tree.

A user's file is `preset: NAME` and what differs from it, or everything spelled out.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from cluster.config import ConfigError, config_error, merge, read_config_file
from cluster.deploy.sections import (
    INCREMENTAL,
    AttentionGroup,
    Auth,
    DnsLabel,
    ExpertGroup,
    Gateway,
    GcsRedis,
    Head,
    IngressGroup,
    Model,
    Monitoring,
    NetworkRules,
    Section,
    Storage,
    Times,
    Upgrade,
)

PRESETS = ("cpu-dev", "gpu-small", "gpu-large")
RayServiceName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
"""KubeRay refuses longer names: it appends to them."""


class DeployConfig(Section):
    """Everything that `shoal k8s` can be told."""

    name: RayServiceName = "shoal"
    namespace: DnsLabel = "shoal"
    preset: Literal["cpu-dev", "gpu-small", "gpu-large"] | None = None
    """Settings to start from; those of the file go on top."""
    image: Annotated[str, Field(min_length=1)]
    """Built from k8s/Dockerfile; the same for all pods."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[DnsLabel, ...] = ()
    log_to_stderr: bool = False
    """Logs of all processes to the containers' output, for a collector and `shoal k8s logs`. They
    are in Ray's files and dashboard otherwise: it is one or the other."""
    model: Model
    head: Head = Head()
    ingress: IngressGroup = IngressGroup()
    attention: AttentionGroup = AttentionGroup()
    experts: ExpertGroup = ExpertGroup()
    overcommit: Annotated[float, Field(ge=1, le=16)] = 1
    """Limits divided by this are the requests: 1 reserves all, more suits a laptop."""
    storage: Storage = Storage()
    upgrade: Upgrade = Upgrade()
    auth: Auth = Auth()
    times: Times = Times()
    monitoring: Monitoring = Monitoring()
    network_policy: NetworkRules = NetworkRules()
    gateway: Gateway = Gateway()
    gcs_redis: GcsRedis = GcsRedis()
    admin_objects: bool = True
    """Also what only an administrator may make: Namespace, PriorityClasses, the deployer's Role."""
    settings: dict[str, Any] = {}
    """Of the application, on top of those that follow from the rest: the tree of
    cluster.config.ShoalConfig, such as {strict_params: true}."""

    @property
    def serves_grpc(self) -> bool:
        """KubeRay 1.7 routes HTTP only while it upgrades step by step."""
        return self.upgrade.strategy != INCREMENTAL

    @model_validator(mode="after")
    def _model_can_be_read(self) -> Self:
        path, mount = self.model.path, self.storage.mount_path.rstrip("/")
        if path is None:
            return self
        if not (self.storage.claim or self.storage.host_path):
            raise ValueError(f"model.path {path} needs storage.claim or storage.host_path")
        if not path.startswith(f"{mount}/"):
            raise ValueError(f"model.path {path} is not under storage.mount_path {mount}")
        return self


def read_deploy_config(path: Path) -> DeployConfig:
    """The deployment that a file describes. Raises ConfigError: file, field, value, fix."""
    data = read_config_file(path)
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("config"), str):
        data = merge(data, {"model": {"config": _read_json(path.parent / model["config"])}})
    try:
        return parse_deploy_config(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_deploy_config(data: dict[str, Any]) -> DeployConfig:
    """The preset, if one is named, with `data` on top. Raises ConfigError."""
    if (preset := data.get("preset")) is not None:
        data = merge(_preset(preset), data)
    try:
        return DeployConfig.model_validate(data)
    except ValidationError as error:
        hint = "add it, or name a preset"
        raise config_error(DeployConfig, error, "deploy.yaml", hint) from None


def preset_config(name: str) -> DeployConfig:
    """A preset as it is. Raises ConfigError for an unknown name."""
    return parse_deploy_config({"preset": name})


def _preset(name: Any) -> dict[str, Any]:
    if name not in PRESETS:
        raise ConfigError(f"preset = {name!r}: known ones are {', '.join(PRESETS)}")
    text = files("cluster.deploy").joinpath("presets", f"{name}.yaml").read_text()
    return dict(yaml.safe_load(text))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; model.config names the model's config.json") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object, found {type(data).__name__}")
    return data
