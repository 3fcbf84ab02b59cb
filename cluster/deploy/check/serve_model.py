"""The fields of a Serve config file (Ray 2.60) that stand in serveConfigV2."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Override = dict[str, Any]


class Model(BaseModel):
    """Ray converts texts to numbers here, as pydantic does by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HttpOptions(Model):
    host: str = "0.0.0.0"  # noqa: S104 - Serve's own default
    port: int = 8000
    root_path: str = ""
    request_timeout_s: float | None = None
    keep_alive_timeout_s: int = 90
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None


class GrpcOptions(Model):
    port: int = 9000
    grpc_servicer_functions: list[str] = []
    request_timeout_s: float | None = None
    enable_reflection: bool = True


class LoggingConfig(Model):
    encoding: Literal["TEXT", "JSON"] = "TEXT"
    log_level: int | str = "INFO"
    logs_dir: str | None = None
    enable_access_log: bool = True
    additional_log_standard_attrs: list[str] = []


class Application(Model):
    import_path: str
    name: str = "default"
    route_prefix: str | None = "/"
    args: dict[str, Any] = {}
    runtime_env: dict[str, Any] = {}
    deployments: list[Override] = []
    logging_config: LoggingConfig | None = None
    autoscaling_policy: dict[str, Any] | None = None
    external_scaler_enabled: bool = False
    host: str | None = None
    port: int | None = None


class ServeConfig(Model):
    applications: list[Application]
    proxy_location: Literal["EveryNode", "HeadOnly", "Disabled"] = "EveryNode"
    http_options: HttpOptions = HttpOptions()
    grpc_options: GrpcOptions = GrpcOptions()
    logging_config: LoggingConfig | None = None
    controller_options: dict[str, Any] | None = None
    tracing_config: dict[str, Any] | None = None
    target_capacity: float | None = None
