"""Channels: frames of activations and control messages between processes.

channel.py     the door: connect, wait_readable, Server and the errors
connection.py  what a connection promises, its errors and its credits
frame.py       what a frame is, its limits and the answers to one
rules.py       what a frame must keep to be sent or accepted
codec.py       frame <-> bytes
tensors.py     the sections of a frame that are tensors; torch is imported with the first of them
handshake.py   mutual proof of the cluster's secret; limits, credits, kind of memory
endpoint.py    "unix:/path", "tcp:host:port", "inproc:name", "shm:/path", "cuda:/path", "nixl:..."
stream.py      a connection over a unix or tcp socket
dial.py        how a client gets one
listener.py    how a server gets one
establish.py   from a socket to a connection of the kind that both sides can
outbox.py      sending to a peer that may not read
questions.py   asking a peer that answers later, out of order or never
inproc.py      the same inside one process
server.py      accepting, one thread a connection
counters.py    what a channel counts

Rows through memory (shm, cuda, nixl):
ring.py           a connection that puts rows into the peer's ring and then says where
envelope.py       what stands before each of its frames
arena.py          who uses which bytes of a ring: the sender's books and the receiver's
landing.py        the receiver's ring; rows that are views of it
memory.py         what every kind of memory promises
blocks.py         memory of the host
ends.py           one side's memory of a connection, by kind
offer.py          telling and opening the rings after the handshake; falling back
shared_memory.py  memfd      cuda_memory.py  CUDA IPC      nixl_memory.py  remote writes
"""
