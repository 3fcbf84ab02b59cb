"""`shoal serve --inline`: an inline cluster behind HTTP on this machine."""

from __future__ import annotations

import threading
import time

import uvicorn

from cluster import machine_code
from cluster.config import ConfigError, ShoalConfig
from cluster.inline import InlineCluster


class InlineServer:
    """An inline cluster behind HTTP on this machine (gRPC needs Serve's proxy)."""

    dashboard_url: str | None = None
    stage = "loading"
    gpus = ""

    def __init__(self, config: ShoalConfig) -> None:
        """Raises ConfigError for what needs processes that come and go."""
        if config.experts.scaling or config.attention.scaling or config.enable_chaos:
            raise ConfigError(
                "--inline: workers of one process can neither scale nor die; serve without "
                "--inline, or leave out --enable-chaos and the ranges of --experts, --attention"
            )
        self._config = config
        self._cluster: InlineCluster | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Returns once HTTP answers; weights may still load (see /readyz)."""
        if machine_code.is_missing():
            self.stage = machine_code.STAGE
            machine_code.compile_all()
        self.stage = "starting the workers"
        self._cluster = InlineCluster(self._config)
        self.gpus = self._cluster.gpus
        listen = self._config.listen
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._cluster.ingress.http_app(),
                host=listen.host,
                port=listen.http_port,
                log_level="warning",
                access_log=False,
            )
        )
        self._thread = threading.Thread(target=self._server.run, name="http", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        if not self._server.started:
            raise ConfigError(f"listen.http_port = {listen.http_port}: cannot listen there")

    def drain(self) -> None:
        """Stop listening; uvicorn lets open requests finish."""
        if self._cluster is not None:
            self._cluster.ingress.loads.close()  # watches have no end of their own
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()

    def stop(self) -> None:
        """Take everything down at once."""
        if self._server is not None:
            self._server.force_exit = True
            self._server.should_exit = True
        if self._cluster is not None:
            self._cluster.close()
