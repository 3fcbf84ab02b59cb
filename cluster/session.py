"""A server for the length of a `with` block: checked, started with progress, taken down cleanly."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import typer

from cluster.config import API_KEY_VARIABLE, LOOPBACK, ConfigError, ShoalConfig, StartFailed
from cluster.console import Stage, Stages, StopSignals, stderr, stop_signals
from cluster.frontend.api_keys import open_keys
from cluster.http_client import ApiClient, ApiError
from cluster.launcher import LocalCluster, check_ports, free_port
from cluster.model_store import check_engine, check_model
from cluster.observability.logs import console_logs
from cluster.observability.text_log import WARNING as PROMPTS_ARE_LOGGED
from cluster.observability.traces import check_traces
from experts.errors import CheckpointError

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 1800.0
DRAIN_TIMEOUT_S = 60.0
START_CANCEL_S = 15.0


class Launch(Protocol):
    """What `running` needs of a way to serve."""

    dashboard_url: str | None
    stage: str
    gpus: str

    def start(self) -> None: ...

    def drain(self) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    url: str
    grpc_address: str
    dashboard_url: str | None
    gpus: str
    """How they were divided; empty without any."""
    signals: StopSignals


@contextmanager
def running(
    config: ShoalConfig, inline: bool = False, dashboard: bool = True, show_log: bool = False
) -> Iterator[RunningServer]:
    """Check, start, wait until ready, yield, drain, stop. Port 0 means any free one. The log of
    this process goes to standard error: warnings, with `show_log` everything, of replicas too.

    Raises CheckpointError and ConfigError before anything starts, typer.Exit(130) when stopped by
    a signal on the way up.
    """
    check_model(config.model)
    check_engine(config)
    check_traces(config.observability)
    _check_keys(config)
    config = _to_serve_here(config)
    check_ports(config)
    log, level = config.observability, logging.INFO if show_log else logging.WARNING
    with stop_signals() as signals, console_logs(log.log_format, level, log.log_prompts):
        if log.log_prompts and not inline:  # the ingress's own warning is in its file
            logger.warning(PROMPTS_ARE_LOGGED)
        launch = _launch(config, inline, dashboard, show_log)
        starter = _Starter(launch)
        try:
            _wait_until_ready(starter, config, signals)
            grpc_address = _address(config.listen.host, config.listen.grpc_port)
            yield RunningServer(
                _url(config), grpc_address, launch.dashboard_url, launch.gpus, signals
            )
            _until_second_signal(launch.drain, signals)
        finally:
            starter.done.wait(START_CANCEL_S)  # Ray cannot be stopped while it comes up
            launch.stop()
            starter.release()


def _launch(config: ShoalConfig, inline: bool, dashboard: bool, show_log: bool) -> Launch:
    if inline:
        from cluster.inline_server import InlineServer

        return InlineServer(config)
    return LocalCluster(config, dashboard=dashboard, show_log=show_log)


def _to_serve_here(config: ShoalConfig) -> ShoalConfig:
    ports = {
        name: getattr(config.listen, name) or free_port(config.listen.host)
        for name in ("http_port", "grpc_port")
    }
    listen = config.listen.model_copy(update=ports)
    return config.model_copy(update={"listen": listen}).served_here()


def _check_keys(config: ShoalConfig) -> None:
    """Raises ConfigError for keys that cannot be read, and for none where others can connect."""
    keys, host = open_keys(config.auth), config.listen.host
    if keys is None and host not in LOOPBACK and not config.auth.insecure:
        raise ConfigError(
            f"listen.host = {host!r}: whoever reaches it could use this server, which has no API"
            f" keys; set {API_KEY_VARIABLE} or --keys-file (`shoal key new` makes keys), or accept"
            " it with --insecure (auth.insecure: true)"
        )


def _url(config: ShoalConfig) -> str:
    return f"http://{_address(config.listen.host, config.listen.http_port)}"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Starter:
    """Starts in a thread of its own, so that Ctrl-C is heard at once meanwhile.

    The thread must outlive the start: Linux kills Ray's processes, which ask for it, when the
    thread that started them ends.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.failure: BaseException | None = None
        self.done = threading.Event()
        self._released = threading.Event()
        threading.Thread(target=self._run, name="start", daemon=True).start()

    def _run(self) -> None:
        try:
            self.launch.start()
        except BaseException as error:
            self.failure = error  # raised again in the main thread
        self.done.set()
        self._released.wait()

    def release(self) -> None:
        """Let the thread end."""
        self._released.set()


def _wait_until_ready(starter: _Starter, config: ShoalConfig, signals: StopSignals) -> None:
    client = ApiClient(_url(config), timeout_s=5)

    def poll() -> Stage | None:
        signals.arm()
        if signals.first.is_set():
            raise typer.Exit(130)
        if starter.failure:
            raise _as_one_line(starter.failure)
        if not starter.done.is_set():
            return Stage(starter.launch.stage)
        return _readiness(client)

    with Stages() as stages:
        if not stages.wait(poll, READY_TIMEOUT_S):
            raise ConfigError(f"not ready after {READY_TIMEOUT_S:.0f} s: see `shoal doctor`")


def _as_one_line(error: BaseException) -> BaseException:
    """Our own errors as they are; what Ray raises as its last line, which names the cause."""
    if isinstance(error, ConfigError | CheckpointError):
        return error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return StartFailed(f"the cluster did not start: {lines[-1]}; see the logs in /tmp/ray")


def _readiness(client: ApiClient) -> Stage | None:
    try:
        status, body = client.get("/readyz")
    except ApiError:
        return Stage("waiting for the HTTP proxy")
    if status == 200:
        return None
    if not isinstance(body, dict) or "stage" not in body:
        return Stage("waiting for the ingress")
    return Stage(str(body["stage"]), int(body.get("done") or 0), int(body.get("total") or 0))


def _until_second_signal(drain: Callable[[], None], signals: StopSignals) -> None:
    """Run the drain, but stop waiting for it at the second Ctrl-C."""
    thread = threading.Thread(target=drain, name="drain", daemon=True)
    thread.start()
    deadline = DRAIN_TIMEOUT_S
    while thread.is_alive() and not signals.second.wait(0.1) and deadline > 0:
        deadline -= 0.1
    if thread.is_alive():
        stderr.print("Stopping now.")
