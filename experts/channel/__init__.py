"""Channels: frames of activations and control messages between processes.

channel.py     the door: connect, wait_readable, Server and the errors
connection.py  what a connection promises, its errors and its credits
frame.py       what a frame is, its limits and the answers to one
rules.py       what a frame must keep to be sent or accepted
codec.py       frame <-> bytes
handshake.py   mutual proof of the cluster's secret; limits and credits
endpoint.py    "unix:/path", "tcp:host:port", "inproc:name"
stream.py      a connection over a unix or tcp socket
dial.py        how a client gets one
listener.py    how a server gets one
inproc.py      the same inside one process
server.py      accepting, one thread a connection
counters.py    what a channel counts
"""
