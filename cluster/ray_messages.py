"""What Ray tells the terminal of the process that started it: one line a death, the rest as log.

Ray 2.60 prints ten lines of advice for every worker that dies, and an error for each call that its
own shutdown cuts off; nothing but a private function stands between those and the terminal.
"""

from __future__ import annotations

import logging
import re
from typing import Any

logger = logging.getLogger(__name__)

_DEATH = "A worker died"
_PID = re.compile(r"Worker PID: (\d+)")


def tame() -> None:
    """From now on Ray's messages go through `show`."""
    import ray._private.worker as ray_worker

    if not callable(getattr(ray_worker, "print_to_stdstream", None)):
        logger.info("this Ray prints its messages in another way: they are left as they are")
        return
    ray_worker.print_to_stdstream = show


def show(data: dict[str, Any], ignore_prefix: bool = False) -> None:
    """A message of Ray: `data["lines"]`."""
    for line in map(str, data["lines"]):
        if line.startswith(_DEATH):
            pid = _PID.search(line)
            process = f"process {pid[1]}" if pid else "a worker process"
            logger.warning("%s died, another one is being started", process)
        else:
            logger.info("Ray: %s", line)
