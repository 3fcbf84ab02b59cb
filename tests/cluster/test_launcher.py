"""Where a server can listen, told before anything starts."""

from __future__ import annotations

import socket

import pytest

from cluster.config import ConfigError, Listen, ShoalConfig
from cluster.launcher import FREE_PORTS, check_ports, free_port
from cluster.session import _address


def config(host: str, http_port: int) -> ShoalConfig:
    return ShoalConfig(listen=Listen(host=host, http_port=http_port, grpc_port=free_port()))


@pytest.mark.parametrize("host", ["192.0.2.1", "127.0.0..1", "no.such.host.invalid"])
def test_a_host_that_is_not_here_is_named(host: str) -> None:
    """One of another machine (kept free for documentation), one mistyped, one unknown."""
    for look in (lambda: free_port(host), lambda: check_ports(config(host, 8000))):
        with pytest.raises(ConfigError, match=f"listen.host = '{host}'") as refused:
            look()
        assert "\n" not in str(refused.value) and "stop what listens" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_taken_port_is_told_from_a_free_one(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as taken:
        try:
            taken.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"listen.http_port = {port}: taken.*--http-port"):
            check_ports(config(host, port))
    assert free_port(host) in FREE_PORTS
    check_ports(config(host, port))


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert (_address("::1", 80), _address("localhost", 80)) == ("[::1]:80", "localhost:80")
