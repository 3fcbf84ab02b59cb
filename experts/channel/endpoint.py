"""Endpoints are strings: "unix:/path", "tcp:host:port" (port 0: any free one), "inproc:name"."""

import os
from typing import NamedTuple

MAX_UNIX_PATH_BYTES = 107  # sockaddr_un holds 108 with the closing zero


class Endpoint(NamedTuple):
    """A parsed endpoint. `address` is a path or a name, `port` counts for tcp only."""

    scheme: str
    address: str
    port: int = 0

    def __str__(self) -> str:
        if self.scheme != "tcp":
            return f"{self.scheme}:{self.address}"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"tcp:{host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """Raises ValueError that names the endpoint and the rule it breaks."""
    scheme, _, rest = text.partition(":")
    if scheme == "inproc" and rest:
        return Endpoint(scheme, rest)
    if scheme == "unix":
        return Endpoint(scheme, _checked_path(rest))
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        if host and port.isascii() and port.isdigit() and int(port) <= 65535:
            return Endpoint(scheme, host.removeprefix("[").removesuffix("]"), int(port))
    raise ValueError(f"endpoint {text!r} is none of unix:/path, tcp:host:port, inproc:name")


def _checked_path(path: str) -> str:
    num_bytes = len(os.fsencode(path))
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"unix socket path {path!r} must be absolute")
    if num_bytes > MAX_UNIX_PATH_BYTES:
        raise ValueError(
            f"unix socket path has {num_bytes} bytes, at most {MAX_UNIX_PATH_BYTES} fit: {path}"
        )
    return path
