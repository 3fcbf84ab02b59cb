"""From a socket whose peer has proved the secret to a connection, with or without landing rings."""

import socket

from experts.channel.connection import Flow
from experts.channel.counters import ChannelCounters
from experts.channel.endpoint import Endpoint, Memory
from experts.channel.handshake import Terms
from experts.channel.memory import ChannelMemory
from experts.channel.offer import End, exchange, fall_back
from experts.channel.ring import RingConnection
from experts.channel.stream import StreamConnection


def establish(
    sock: socket.socket,
    peer: str,
    endpoint: Endpoint,
    flow: Flow,
    mine: Terms,
    theirs: Terms,
    memory: ChannelMemory,
    counters: ChannelCounters,
) -> StreamConnection:
    """Raises ChannelError; the caller closes the socket."""
    arguments = (sock, peer, flow, mine.limits, theirs.limits, counters, memory.allocate)
    kind = Memory(mine.memory)
    if kind is Memory.NONE or theirs.memory != kind:
        if endpoint.memory is not Memory.NONE:
            side = "this side" if kind is Memory.NONE else "the peer"
            fall_back(counters, endpoint.memory, f"{peer}: {side} cannot")
        return StreamConnection(*arguments)
    from experts.channel.ends import make_end  # loaded by check_available

    end: End | None = make_end(kind, memory, counters)
    try:
        outlet = exchange(sock, kind, end, counters)
    except BaseException:
        if end is not None:
            end.close()
        raise
    return RingConnection(*arguments, end=end, outlet=outlet)
