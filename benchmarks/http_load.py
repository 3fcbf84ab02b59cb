"""Process that puts load on an HTTP server: a scenario on stdin, the records on stdout.

A process of its own, so that the client does not share an interpreter lock with the server.
"""

import json
import sys
from dataclasses import asdict

from serving.drive import run
from serving.plan import Scenario
from serving.sse import SseTarget

if __name__ == "__main__":
    job = json.load(sys.stdin)
    records = run(SseTarget(job["url"]), Scenario(**job["scenario"]), job["seed"])
    json.dump([asdict(record) for record in records], sys.stdout)
