"""An attention worker with experts and traces, as a process of its own: FOLDER SOCKET.

It says "ready" and serves until its standard input ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

from attention.config import AttentionConfig
from attention.tracing import open_tracer
from attention.worker import AttentionWorker
from experts.checkpoint import Checkpoint
from tests.router.pool import SECRET, Pool, spread


def main() -> None:
    folder, endpoint = Path(sys.argv[1]), sys.argv[2]
    checkpoint = Checkpoint.open(folder)
    pool = Pool(checkpoint, spread(checkpoint, 2))
    tracer = open_tracer("attention", "attention-1")
    config = AttentionConfig(num_kv_blocks=64, block_size=4, max_num_seqs=4)
    worker = AttentionWorker(checkpoint, pool.router(), config, tracer=tracer)
    worker.start(endpoint, SECRET)
    print("ready", flush=True)
    sys.stdin.read()
    worker.close()
    tracer.close()
    pool.close()


if __name__ == "__main__":
    main()
