"""Hook that runs inside every Serve proxy before it listens (Serve imports it by name).

Ray 2.60's gRPC proxy listens on all interfaces whatever host is configured; a laptop must not be
reachable from its network by default. This module is the only place that touches that private
function; tests/cluster/test_serving.py holds the contract (nothing listens beyond the host).
"""

from __future__ import annotations

import os
from typing import Any

from cluster.limits import MAX_GRPC_MESSAGE_BYTES

GRPC_HOST_VARIABLE = "SHOAL_GRPC_HOST"


def environment(host: str) -> dict[str, str]:
    """Variables that Serve's proxies read at their start: set them before Ray starts."""
    return {
        GRPC_HOST_VARIABLE: host,
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.configure",
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MAX_GRPC_MESSAGE_BYTES),
    }


def configure() -> list[Any]:
    """Make the gRPC proxy of this process listen on SHOAL_GRPC_HOST. Returns no HTTP middleware."""
    from ray.serve._private import default_impl

    host = os.environ.get(GRPC_HOST_VARIABLE)
    if host:

        def add_address(server: Any, address: str) -> None:
            port = address.rpartition(":")[2]
            server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

        default_impl.add_grpc_address = add_address
    return []
