"""Whether traces can be made here."""

from __future__ import annotations

import importlib

from cluster.config import ConfigError, Observability

INSTALL = "pip install 'shoal-serve[otel]'"
_PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def missing_package() -> str | None:
    """The name of one that traces need and that is not installed."""
    try:
        for name in _PACKAGES:
            importlib.import_module(name)
    except ImportError as error:
        return error.name or str(error)
    return None


def check_traces(settings: Observability) -> None:
    """Raises ConfigError if traces are asked for and cannot be made."""
    if settings.traces and (missing := missing_package()):
        raise ConfigError(f"observability.traces = True: {missing} is missing; {INSTALL}")
