"""Channels: frames of activations and control messages between processes.

channel.py     the door: connect, wait_readable, Server and the errors
connection.py  what a connection promises, its errors and its credits
frame.py       what a frame is, its limits and the answers to one
codec.py       frame <-> bytes, and every check a frame must pass
handshake.py   mutual proof of the cluster's secret; limits and credits
endpoint.py    "unix:/path", "tcp:host:port", "inproc:name"
stream.py      unix and tcp sockets
inproc.py      the same inside one process
server.py      accepting, one thread a connection
counters.py    what a channel counts
"""
