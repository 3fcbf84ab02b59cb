"""Python runs this in every process of a server under test: it enters the arm that it is told.

Each process listens at a datagram socket named by its pid in the folder $SHOAL_BENCH_SWITCH and
answers how many of the benchmark's functions it has.
"""

import os
import socket
import sys
import threading


def _listen(folder: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(os.path.join(folder, str(os.getpid())))
        while True:
            arm, sender = inbox.recvfrom(64)
            inbox.sendto(str(_enter(arm.decode())).encode(), sender)


def _enter(arm: str) -> int:
    if "cluster" not in sys.modules:
        return 0
    from observing.arms import enter

    return enter(arm)


if folder := os.environ.get("SHOAL_BENCH_SWITCH"):
    threading.Thread(target=_listen, args=(folder,), name="bench-switch", daemon=True).start()
