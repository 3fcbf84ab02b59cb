"""Both sides prove that they know the cluster's secret before a single frame is read.

    server -> client   magic, version, challenge
    client -> server   magic, version, challenge, terms, proof
    server -> client   magic, version, challenge (zeros), terms, proof

Terms: five limits, credits (of a client: 0), the kind of memory that this side can use for rows.
A proof is HMAC-SHA256(secret, role, both challenges, the terms of its own message).
The role stops a proof from being reflected, the fresh challenges stop it from being replayed.
Messages have fixed sizes, so that a stranger makes this side allocate nothing; it ends after
HANDSHAKE_TIMEOUT_S however slowly the bytes come.
"""

import hmac
import secrets
import socket
import struct
import time
from dataclasses import astuple, dataclass

from experts.channel.codec import MAGIC, VERSION
from experts.channel.connection import ChannelClosed, ChannelRefused, ChannelTimeout
from experts.channel.frame import FrameLimits

HANDSHAKE_TIMEOUT_S = 2.0
_CHALLENGE_BYTES = 32
_PROOF_BYTES = 32
_HELLO = struct.Struct("<4sB3x32s")
_TERMS = struct.Struct("<7I")  # the five limits, credits, kind of memory
_U32 = 2**32 - 1
_REPLY_BYTES = _HELLO.size + _TERMS.size + _PROOF_BYTES


@dataclass(frozen=True)
class Terms:
    """What the other side accepts, how many batches may be in flight (from a server), and how rows
    could travel: a number of memory.Memory, 0 for in the frame; used when both sides say the same.
    """

    limits: FrameLimits
    credits: int
    memory: int = 0

    def pack(self) -> bytes:
        limits = (min(value, _U32) for value in astuple(self.limits))
        return _TERMS.pack(*limits, self.credits, self.memory)


def _unpack_terms(data: bytes) -> Terms:
    *limits, num_credits, memory = _TERMS.unpack(data)
    return Terms(FrameLimits(*limits), num_credits, memory)


def _proof(secret: bytes, role: bytes, first: bytes, second: bytes, terms: bytes) -> bytes:
    return hmac.digest(secret, b"shoal-" + role + first + second + terms, "sha256")


def receive_exactly(sock: socket.socket, num_bytes: int, deadline_s: float) -> bytes:
    data = b""
    while len(data) < num_bytes:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise ChannelTimeout("handshake took too long")
        sock.settimeout(left_s)
        try:
            chunk = sock.recv(num_bytes - len(data))
        except TimeoutError:
            raise ChannelTimeout("handshake took too long") from None
        except OSError as error:
            raise ChannelClosed(f"connection lost in the handshake: {error}") from error
        if not chunk:
            raise ChannelClosed("peer closed in the handshake")
        data += chunk
    return data


def send_all(sock: socket.socket, data: bytes, deadline_s: float) -> None:
    sock.settimeout(max(0.001, deadline_s - time.monotonic()))
    try:
        sock.sendall(data)
    except TimeoutError:
        raise ChannelTimeout("handshake took too long") from None
    except OSError as error:
        raise ChannelClosed(f"connection lost in the handshake: {error}") from error


def _challenge_in(hello: bytes) -> bytes:
    magic, version, challenge = _HELLO.unpack(hello)
    if magic != MAGIC:
        raise ChannelRefused("peer does not speak this protocol")
    if version != VERSION:
        raise ChannelRefused(f"peer speaks protocol version {version}, this side {VERSION}")
    return bytes(challenge)


def _split_reply(data: bytes) -> tuple[bytes, bytes, bytes]:
    """hello, terms, proof."""
    return data[: _HELLO.size], data[_HELLO.size : -_PROOF_BYTES], data[-_PROOF_BYTES:]


def serve_handshake(
    sock: socket.socket, secret: bytes, terms: Terms, timeout_s: float = HANDSHAKE_TIMEOUT_S
) -> Terms:
    """The server's side. Returns the client's terms; raises ChannelError (the caller closes)."""
    deadline_s = time.monotonic() + timeout_s
    mine = secrets.token_bytes(_CHALLENGE_BYTES)
    send_all(sock, _HELLO.pack(MAGIC, VERSION, mine), deadline_s)
    hello, their_terms, proof = _split_reply(receive_exactly(sock, _REPLY_BYTES, deadline_s))
    theirs = _challenge_in(hello)
    if not hmac.compare_digest(proof, _proof(secret, b"client", mine, theirs, their_terms)):
        raise ChannelRefused("client does not know the secret")
    packed = terms.pack()
    own_proof = _proof(secret, b"server", mine, theirs, packed)
    hello = _HELLO.pack(MAGIC, VERSION, bytes(_CHALLENGE_BYTES))
    send_all(sock, hello + packed + own_proof, deadline_s)
    sock.settimeout(None)
    return _unpack_terms(their_terms)


def join_handshake(
    sock: socket.socket, secret: bytes, terms: Terms, timeout_s: float = HANDSHAKE_TIMEOUT_S
) -> Terms:
    """The client's side. Returns the server's terms."""
    deadline_s = time.monotonic() + timeout_s
    theirs = _challenge_in(receive_exactly(sock, _HELLO.size, deadline_s))
    mine = secrets.token_bytes(_CHALLENGE_BYTES)
    packed = terms.pack()
    own_proof = _proof(secret, b"client", theirs, mine, packed)
    send_all(sock, _HELLO.pack(MAGIC, VERSION, mine) + packed + own_proof, deadline_s)
    try:
        answer = receive_exactly(sock, _REPLY_BYTES, deadline_s)
    except ChannelClosed as error:
        raise ChannelRefused("the server refused the secret or closed") from error
    hello, their_terms, proof = _split_reply(answer)
    _challenge_in(hello)
    if not hmac.compare_digest(proof, _proof(secret, b"server", theirs, mine, their_terms)):
        raise ChannelRefused("server does not know the secret")
    sock.settimeout(None)
    return _unpack_terms(their_terms)
