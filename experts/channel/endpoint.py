"""Endpoints are strings.

unix:/path, tcp:host:port   frames over a socket (port 0: any free one)
inproc:name                 by reference, inside one process
shm:/path, cuda:/path       a unix socket, rows through memory of the host or of a GPU
nixl:host:port              a TCP connection, rows by remote writes
"""

import os
from enum import IntEnum
from typing import NamedTuple

MAX_UNIX_PATH_BYTES = 107  # sockaddr_un holds 108 with the closing zero
_UNIX = ("unix", "shm", "cuda")
_TCP = ("tcp", "nixl")


class Memory(IntEnum):
    """How rows travel on a connection, told in the handshake; the same at both ends or NONE."""

    NONE = 0  # in the frame
    SHM = 1  # shared memory of one host
    CUDA = 2  # memory of a GPU, opened by another process of its host
    NIXL = 3  # remote writes, between hosts


_MEMORY = {"shm": Memory.SHM, "cuda": Memory.CUDA, "nixl": Memory.NIXL}


class Endpoint(NamedTuple):
    """A parsed endpoint. `address` is a path, a name or a host; `port` counts for hosts only."""

    scheme: str
    address: str
    port: int = 0

    @property
    def is_unix(self) -> bool:
        return self.scheme in _UNIX

    @property
    def memory(self) -> Memory:
        """How rows travel, where both sides can."""
        return _MEMORY.get(self.scheme, Memory.NONE)

    def __str__(self) -> str:
        if self.scheme not in _TCP:
            return f"{self.scheme}:{self.address}"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.scheme}:{host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """Raises ValueError that names the endpoint and the rule it breaks."""
    scheme, _, rest = text.partition(":")
    if scheme == "inproc" and rest:
        return Endpoint(scheme, rest)
    if scheme in _UNIX:
        return Endpoint(scheme, _checked_path(rest))
    if scheme in _TCP:
        host, _, port = rest.rpartition(":")
        if host and port.isascii() and port.isdigit() and int(port) <= 65535:
            return Endpoint(scheme, host.removeprefix("[").removesuffix("]"), int(port))
    forms = "unix:/path, shm:/path, cuda:/path, tcp:host:port, nixl:host:port, inproc:name"
    raise ValueError(f"endpoint {text!r} is none of {forms}")


def _checked_path(path: str) -> str:
    num_bytes = len(os.fsencode(path))
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"unix socket path {path!r} must be absolute")
    if num_bytes > MAX_UNIX_PATH_BYTES:
        raise ValueError(
            f"unix socket path has {num_bytes} bytes, at most {MAX_UNIX_PATH_BYTES} fit: {path}"
        )
    return path
