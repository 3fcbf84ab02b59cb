"""Who computes on the CPU does not load what computes on GPUs."""

import subprocess
import sys

MEMBERS = """
import sys
import cluster.members
print([m for m in sys.modules if m.split(".")[0] in ("triton", "nixl") or ".kernels.gpu" in m])
"""


def test_the_workers_of_a_laptop_import_no_gpu_kernels() -> None:
    done = subprocess.run([sys.executable, "-c", MEMBERS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
