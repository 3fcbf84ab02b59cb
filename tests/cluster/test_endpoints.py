"""Where workers of a channel listen: rows through memory, control messages over plain sockets."""

from __future__ import annotations

import warnings

import pytest

from cluster.config import ConfigError, parse_config
from experts.channel.endpoint import parse_endpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 warns at import
    from cluster import app


@pytest.mark.parametrize(
    ("channel", "of_rows", "of_messages"),
    [
        ("unix", "unix:/run/x/w-1.sock", "unix:/run/x/w-1.sock"),
        ("shm", "shm:/run/x/w-1.sock", "unix:/run/x/w-1.sock"),
        ("cuda", "cuda:/run/x/w-1.sock", "unix:/run/x/w-1.sock"),
        ("tcp", "tcp:192.0.2.7:0", "tcp:192.0.2.7:0"),
        ("nixl", "nixl:192.0.2.7:0", "tcp:192.0.2.7:0"),
    ],
)
def test_endpoints_of_a_channel(
    channel: str, of_rows: str, of_messages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.7")
    config = parse_config({"channel": channel, "runtime_dir": "/run/x"})
    found = [app._endpoint_for(config, takes_rows)("w-1") for takes_rows in (True, False)]
    assert found == [of_rows, of_messages]
    assert [str(parse_endpoint(text)) for text in found] == found


@pytest.mark.parametrize("channel", ["unix", "shm", "cuda"])
def test_sockets_need_a_folder(channel: str) -> None:
    with pytest.raises(ConfigError, match=f"channel {channel} needs a folder"):
        app.build_app(parse_config({"channel": channel}))


def test_in_a_cluster_cuda_needs_num_gpus() -> None:
    with pytest.raises(ConfigError, match="attention.num_gpus is missing"):
        app.build_app({"channel": "tcp", "device": "cuda"})
