"""Start a local Ray with the application on it, and take both down again without leftovers."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster import machine_code, ray_messages, serve_proxy
from cluster.config import GRPC_SERVICERS, SECRET_VARIABLE, ConfigError, ShoalConfig
from cluster.gpus import divide_gpus
from cluster.model_store import check_engine
from cluster.observability.follow_logs import LogFollower
from cluster.observability.logs import LogFormat
from cluster.serve_start import run_application

logger = logging.getLogger(__name__)

APP_NAME = "shoal"
FREE_PORTS = range(20_000, 30_000)


def check_ports(config: ShoalConfig) -> None:
    """Raise ConfigError for a host that this machine does not have and for a port that is taken."""
    host = config.listen.host
    for name in ("http_port", "grpc_port"):
        port = getattr(config.listen, name)
        if not _is_free(host, port):
            flag = name.replace("_", "-")
            raise ConfigError(
                f"listen.{name} = {port}: taken on {host}; "
                f"stop what listens there or choose another with --{flag}"
            )


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on, outside the range from which Ray and the system take theirs
    at random: one of those may be gone before it is used. Raises ConfigError as `check_ports`."""
    while not _is_free(host, port := secrets.choice(FREE_PORTS)):
        pass
    return port


def _is_free(host: str, port: int) -> bool:
    """Whether nothing listens there. Raises ConfigError where nobody here can."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return False
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on listen.host = {host!r}, port {port}: {reason}"
        ) from None
    return True


class LocalCluster:
    """Ray, Serve and one application at a time on this machine, to start and to stop."""

    def __init__(self, config: ShoalConfig, dashboard: bool = True, show_log: bool = False) -> None:
        """show_log: the replicas' lines on standard error too, not only in their files."""
        self._config = config
        self._dashboard = dashboard
        self._show_log = show_log
        self._follower: LogFollower | None = None
        self._sockets = Path(tempfile.mkdtemp(prefix="shoal-"))
        self._kernels = machine_code.Compilation()
        self.dashboard_url: str | None = None
        self.stage = "starting Ray"
        """What `start` is at, for people."""
        self.gpus = ""
        """How the GPUs were divided, for people; empty without any."""

    def start(self) -> None:
        """Returns once every deployment's replicas run; weights may still load (see /readyz)."""
        self.start_ray()
        self.deploy(self._config)

    def start_ray(self) -> None:
        """A Ray of our own, with Serve's proxies: a cluster that happens to run is left alone.

        Missing machine code is compiled meanwhile; `deploy` waits for it.
        """
        self._kernels.start()
        os.environ.update(serve_proxy.environment(self._config.listen.host))
        os.environ.setdefault(SECRET_VARIABLE, secrets.token_hex(32))
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # workers share the cores: no spinning
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

        for name in ("ray", "ray.serve"):  # our own stages say what happens
            logging.getLogger(name).setLevel(logging.ERROR)
        ray_messages.tame()

        context: Any = ray.init(
            address="local",
            namespace=APP_NAME,
            include_dashboard=self._dashboard,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        if self._dashboard and context.dashboard_url:
            self.dashboard_url = f"http://{context.dashboard_url}"
        if self._show_log:
            folder = Path(context.address_info["session_dir"], "logs", "serve")
            self._follower = LogFollower(folder, sys.stderr)
        listen = self._config.listen
        self.stage = "starting Ray Serve"
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=listen.host, port=listen.http_port),
            grpc_options=gRPCOptions(
                port=listen.grpc_port, grpc_servicer_functions=list(GRPC_SERVICERS)
            ),
            logging_config=_serve_log(self._config.observability.log_format),
        )

    def deploy(self, config: ShoalConfig) -> None:
        """Put the application of `config` on the running Ray; its `listen` is not looked at.

        Raises ConfigError for GPUs that Ray does not have, StartFailed when a worker cannot start.
        """
        import ray

        from cluster.app import build_app

        config, self.gpus = divide_gpus(config, int(ray.cluster_resources().get("GPU", 0)))
        check_engine(config)

        if self._kernels.is_running:
            self.stage = machine_code.STAGE
        self._kernels.wait()
        self.stage = "starting the workers"
        if config.runtime_dir is None:
            config = config.model_copy(update={"runtime_dir": self._sockets})
        log = _serve_log(config.observability.log_format)
        run_application(build_app(config), APP_NAME, log)

    def undeploy(self) -> None:
        """Take the application down, Ray stays: requests in flight may finish first."""
        from ray import serve

        serve.delete(APP_NAME)

    def drain(self) -> None:
        """Take the application and Serve down: requests in flight may finish first."""
        from ray import serve

        try:
            serve.get_app_handle(APP_NAME).drain.remote().result()
        except Exception as error:  # an ingress that is gone has nothing left to finish
            logger.warning("cannot drain: %s", error)
        serve.shutdown()

    def stop(self) -> None:
        """End Ray and all its processes, at once if `drain` was not called."""
        import ray

        self._kernels.stop()
        ray.shutdown()
        if self._follower is not None:
            self._follower.stop()
        shutil.rmtree(self._sockets, ignore_errors=True)


def _serve_log(log_format: LogFormat) -> Any:
    """Of Serve itself only warnings; who asked for what is in our own lines."""
    from ray.serve.schema import LoggingConfig

    encoding = "JSON" if log_format == "json" else "TEXT"
    return LoggingConfig(encoding=encoding, log_level="WARNING", enable_access_log=False)
