"""Listening sockets: a private unix socket file, or a TCP port."""

import contextlib
import os
import socket
import stat
from pathlib import Path

from experts.channel.connection import ChannelError
from experts.channel.endpoint import Endpoint

BACKLOG = 128


def open_listener(endpoint: Endpoint) -> tuple[socket.socket, Endpoint]:
    """A listening socket and its endpoint with the port it got. Raises ChannelError."""
    try:
        if endpoint.is_unix:
            return _open_unix(Path(endpoint.address)), endpoint
        return _open_tcp(endpoint)
    except ChannelError:
        raise
    except OSError as error:
        raise ChannelError(f"cannot listen on {endpoint}: {error}") from error


def _open_tcp(endpoint: Endpoint) -> tuple[socket.socket, Endpoint]:
    family = socket.AF_INET6 if ":" in endpoint.address else socket.AF_INET
    address = (endpoint.address, endpoint.port)
    listener = socket.create_server(address, family=family, backlog=BACKLOG)
    return listener, endpoint._replace(port=listener.getsockname()[1])


def _open_unix(path: Path) -> socket.socket:
    """A socket file of mode 0600, set before listen(): until then nobody can connect."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.parent.stat().st_mode)
    if mode & 0o022:
        raise ChannelError(f"folder {path.parent} has mode {mode:o}: others may write; use 0700")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a server that is gone; refuse anything else."""
    if not path.exists():
        return
    if not path.is_socket():
        raise ChannelError(f"{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # a full backlog: somebody lives there
            pass
    raise ChannelError(f"{path} is in use by another server")


class SocketFile:
    """Remembers which file a listener made, to remove that one and not a successor's."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._path = Path(endpoint.address) if endpoint.is_unix else None
        self._inode = self._path.stat().st_ino if self._path else 0

    def remove(self) -> None:
        if self._path is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                os.unlink(self._path)


def peer_name(sock: socket.socket) -> str:
    """Who is at the other end of an accepted socket, for logs: process id or address."""
    try:
        if sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return f"unix:pid={int.from_bytes(credentials[:4], 'little')}"
        host, port = sock.getpeername()[:2]
        return str(Endpoint("tcp", host, port))
    except OSError:
        return "somebody who has left"
