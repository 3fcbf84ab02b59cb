"""Endpoints: how they are written, and what a server does with its socket file."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from experts.channel.channel import (
    ChannelError,
    Server,
    connect,
)
from experts.channel.endpoint import Memory, parse_endpoint
from tests.experts.frames import (
    SECRET,
)
from tests.experts.stage import echo


def test_endpoints() -> None:
    assert str(parse_endpoint("tcp:127.0.0.1:80")) == "tcp:127.0.0.1:80"
    assert str(parse_endpoint("tcp:[::1]:80")) == "tcp:[::1]:80"
    assert parse_endpoint("unix:/a:b").address == "/a:b"
    assert parse_endpoint("inproc:x").scheme == "inproc"
    for scheme, memory in (("shm", Memory.SHM), ("cuda", Memory.CUDA), ("unix", Memory.NONE)):
        found = parse_endpoint(f"{scheme}:/a:b")
        assert (str(found), found.is_unix, found.memory) == (f"{scheme}:/a:b", True, memory)
    for scheme, memory in (("nixl", Memory.NIXL), ("tcp", Memory.NONE)):
        found = parse_endpoint(f"{scheme}:[::1]:80")
        assert (str(found), found.is_unix, found.memory) == (f"{scheme}:[::1]:80", False, memory)
    for text in (
        "",
        "x",
        "unix:",
        "unix:a",
        "tcp:",
        "tcp:host",
        "tcp::1",
        "tcp:h:70000",
        "nixl:host",
        "nixl:/a",
        "shm:a",
        "cuda:",
        "SHM:/a",
        "inproc:",
    ):
        with pytest.raises(ValueError, match="endpoint|absolute"):
            parse_endpoint(text)


def test_the_longest_unix_path() -> None:
    assert parse_endpoint("unix:/" + "x" * 106).address == "/" + "x" * 106
    with pytest.raises(ValueError, match="has 108 bytes, at most 107 fit"):
        parse_endpoint("unix:/" + "x" * 107)
    with pytest.raises(ValueError, match="has 109 bytes"):
        parse_endpoint("unix:/" + "é" * 54)


def test_tcp_picks_a_port() -> None:
    server = Server("tcp:127.0.0.1:0", echo, SECRET)
    server.start()
    assert int(server.endpoint.rpartition(":")[2]) > 0
    server.close()


def test_the_socket_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "s"
    server = Server(f"unix:{path}", echo, SECRET)
    server.start()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    server.close()
    assert not path.exists()


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    server = Server(f"unix:{path}", echo, SECRET)
    server.start()
    connect(server.endpoint, SECRET).close()
    server.close()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ChannelError, match="is no socket"):
        Server(f"unix:{path}", echo, SECRET).start()
    assert path.read_text() == "data"


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ChannelError, match="has mode 777: others may write; use 0700"):
        Server(f"unix:{tmp_path}/s", echo, SECRET).start()


def test_closing_leaves_a_successor_s_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    old, new = (Server(f"unix:{path}", echo, SECRET) for _ in range(2))
    old.start()
    path.unlink()
    new.start()
    old.close()
    connect(new.endpoint, SECRET).close()
    new.close()


def test_a_channel_needs_a_secret() -> None:
    with pytest.raises(ValueError, match="needs a secret"):
        Server("inproc:x", echo, b"")
